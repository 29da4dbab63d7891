"""Variants of a network against the papers' way: a deep copy and `torch.nn.utils.prune` for every candidate.

    python benchmarks/variants.py [--rounds 7] [--json FILE]

Preparation: Gaussian noise on 11 M weights (ResNet-18), then the 90 % of smallest magnitude to zero, up to a network
that is ready to be evaluated. Memory: how far resident memory rises while many variants are evaluated, in multiples of
the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import median

import torch
from _paired import Row, parser, peak_extra_bytes, ratios, report, steady, timed_rounds
from torch import Tensor, nn
from torch.nn.utils import prune

from secateur.core.targets import find_targets
from secateur.variants import NoisyPrune, Workbench, evaluate_variants

SIGMA, SPARSITY = 0.005, 0.9


def network() -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.get_model("resnet18", weights=None, num_classes=10).eval()


@torch.no_grad()
def by_copy(model: nn.Module) -> nn.Module:
    candidate = copy.deepcopy(model)
    layers = [m for m in candidate.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.weight.add_(torch.randn_like(layer.weight), alpha=SIGMA)
    prune.global_unstructured([(m, "weight") for m in layers], pruning_method=prune.L1Unstructured, amount=SPARSITY)
    return candidate


def in_place(model: nn.Module, sigma: float = SIGMA) -> Callable[[], None]:
    bench = Workbench(model)
    drawn = iter(range(10**9))

    def prepare() -> None:
        with bench.variant(NoisyPrune(sigma, SPARSITY, seed=next(drawn))):
            pass

    return prepare


def preparation(rounds: int) -> list[Row]:
    model = network()
    case = f"{sum(t.numel for t in find_targets(model)) / 1e6:.0f} M weights"
    runs: dict[str, Callable[[], object]] = {
        "deep copy and global_unstructured": lambda: by_copy(model),
        "in place": in_place(model),
        "in place, without noise": in_place(model, 0.0),
    }
    times = timed_rounds(runs, rounds, warm=1)
    peer = times["deep copy and global_unstructured"]
    goals = {"in place": 20.0}
    return [
        Row(case, f"preparation, speed-up: {name}", median(own), *ratios(peer, own), goals.get(name), True)
        for name, own in times.items()
    ]


def evaluated(variants: int) -> Callable[[], object]:
    model = network()
    batches: list[tuple[Tensor, Tensor]] = [(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))]
    bench = Workbench(model)
    return lambda: evaluate_variants(bench, [NoisyPrune(SIGMA, SPARSITY, seed=s) for s in range(variants)], batches)


def memory() -> list[Row]:
    size = 4 * sum(t.numel for t in find_targets(network()))
    rows = []
    for variants in (8, 512):
        extra = peak_extra_bytes(evaluated, variants) / size
        rows.append(Row("11 M weights", f"extra memory, {variants} variants", float("nan"), extra, extra, extra))
    return rows


def main() -> None:
    asked = parser(__doc__, rounds=7).parse_args()
    steady()
    title = "Variants: speed-up of their preparation over the papers' way; extra memory in multiples of the weights"
    report(title, [*preparation(asked.rounds), *memory()], asked.rounds, asked.json)


if __name__ == "__main__":
    main()
