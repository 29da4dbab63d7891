"""The global magnitude threshold of a billion weights, in one thread.

    python benchmarks/billion.py [--weights 1.0] [--rounds 5] [--json FILE]

Float32 weights drawn from a normal distribution, in tensors of 2**25 (4 GB for a billion; they are held twice over, one
after the other). What is measured is the threshold at 90 % sparsity, without masks, which are a quarter of the weights,
whoever makes them. It is checked by counting. Memory is how far resident memory rises meanwhile, in a fresh process.
Beside it, the least that any method takes: one read of all weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median

import torch
from _paired import Row, parser, peak_extra_bytes, ratios, report, steady, timed_rounds
from torch import Tensor

from secateur.core.cells import Cells
from secateur.core.select import _kth_smallest, prune_count

SPARSITY, EACH = 0.9, 1 << 25


def weights(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(min(EACH, count - start), generator=generator) for start in range(0, count, EACH)]


def threshold(tensors: list[Tensor]) -> float:
    cells = [Cells(str(number), tensor, absolute=True) for number, tensor in enumerate(tensors)]
    return _kth_smallest(cells, prune_count(sum(c.size for c in cells), SPARSITY))[0]


def read(tensors: list[Tensor]) -> float:
    return sum(float(tensor.sum()) for tensor in tensors)


def prepared(count: int) -> Callable[[], object]:
    threshold(weights(1 << 20))
    tensors = weights(count)
    return lambda: threshold(tensors)


def right(tensors: list[Tensor], found: float) -> bool:
    count = prune_count(sum(t.numel() for t in tensors), SPARSITY)
    below = sum(int((t.abs() < found).sum()) for t in tensors)
    return below < count <= below + sum(int((t.abs() == found).sum()) for t in tensors)


def times(count: int, rounds: int) -> list[Row]:
    tensors, case = weights(count), f"{count / 1e9:.2f} billion weights"
    runs = {"one read (sum)": lambda: read(tensors), "threshold": lambda: threshold(tensors)}
    took = timed_rounds(runs, rounds, warm=1)
    note = "exact" if right(tensors, threshold(tensors)) else "WRONG"
    own = sorted(t / 1e3 for t in took["threshold"])
    # A second a billion, so that fewer weights can stand for them.
    scale = 1e9 / count
    rows = [
        Row(case, f"{name}, times one read", median(t), *ratios(t, took["one read (sum)"])) for name, t in took.items()
    ]
    rows.append(
        Row(
            case,
            "threshold, seconds a billion",
            median(took["threshold"]),
            scale * median(own),
            scale * own[0],
            scale * own[-1],
            1.0,
            note=note,
        )
    )
    return rows


def main() -> None:
    flags = parser(__doc__, rounds=5)
    flags.add_argument("--weights", type=float, default=1.0, help="billions of weights (default 1)")
    asked = flags.parse_args()
    steady()
    count = round(asked.weights * 1e9)
    rows = times(count, asked.rounds)
    extra = peak_extra_bytes(prepared, count) / 1e6
    case = rows[0].case
    rows.append(Row(case, "threshold, extra memory, MB", math.nan, extra, extra, extra, 100.0))
    report("Global magnitude threshold, 90 %: seconds, and MB of extra memory", rows, asked.rounds, asked.json)
    if any(row.note == "WRONG" for row in rows):
        raise SystemExit("the threshold is not the order statistic that was asked for")


if __name__ == "__main__":
    main()
