"""How much of the saved arithmetic becomes saved time: ResNet-18 with half its units cut, in ONNX Runtime.

The ratio is the share: (dense time / cut time) / (dense MACs / cut MACs), in one runtime, one thread, all
networks taking turns. Half of the units go by one global ranking (random scores: speed depends on how many
channels a layer keeps, not on which), once with the counts as they fall and once rounded up to the next
multiple of 16, the width vector units work in; and, for reference, half of every layer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal

import torch
from _paired import Row, parser, report, steady
from torch import Tensor, nn

from secateur.analysis import latency_ratio, measure_cost, measure_latency
from secateur.criteria.random import Random
from secateur.lab.export import export_onnx, onnx_callable
from secateur.lab.oneshot import prune_units_
from secateur.sparsify.ranking import SelectionRule

GOAL = 0.9
MULTIPLE = 16


def resnet18() -> nn.Module:
    from torchvision.models import resnet18 as build

    torch.manual_seed(0)
    model = build(weights=None, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
    return model.eval()


def cut(sparsity: float, scope: Literal["tensor", "global"], multiple: int, x: Tensor) -> nn.Module:
    """A ResNet-18 without `sparsity` of its units, proven equal to its masked self."""
    model = resnet18()
    if sparsity:
        prune_units_(model, sparsity, x, criterion=Random(), rule=SelectionRule(scope=scope), multiple_of=multiple)
    return model


def main() -> None:
    flags = parser(__doc__, rounds=31)
    flags.add_argument("--size", type=int, default=224, help="input height and width (default 224)")
    flags.add_argument("--batch", type=int, default=1, help="batch size (default 1)")
    flags.add_argument("--sparsity", type=float, default=0.5, help="fraction of units cut (default 0.5)")
    asked = flags.parse_args()
    steady()
    x = torch.randn(5, 3, asked.size, asked.size)
    percent = f"{100 * asked.sparsity:g} %"
    variants = {
        "dense": (0.0, "tensor", 1, None),
        f"{percent} of every layer": (asked.sparsity, "tensor", 1, None),
        f"{percent} global, as it falls": (asked.sparsity, "global", 1, None),
        f"{percent} global, up to multiples of {MULTIPLE}": (asked.sparsity, "global", MULTIPLE, GOAL),
    }
    macs, runs, notes = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (sparsity, scope, multiple, _)) in enumerate(variants.items()):
            model = cut(sparsity, scope, multiple, x)
            file = Path(folder) / f"{number}.onnx"
            export_onnx(model, x, file)
            macs[name] = measure_cost(model, x).macs
            runs[name] = onnx_callable(file, threads=1)
            widths = [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)]
            notes[name] = "widths " + " ".join(map(str, widths))
        times = measure_latency(runs, x, batch_size=asked.batch, rounds=asked.rounds, min_time=0.05, clock="cpu")
    rows = []
    for name, (_, _, _, goal) in variants.items():
        speed, reduction = latency_ratio(times["dense"], times[name]), macs["dense"] / macs[name]
        shares = [value / reduction for value in (speed.median, speed.low, speed.high)]
        note = f"x{speed.median:.2f} of x{reduction:.2f} MACs; {notes[name]}"
        rows.append(
            Row(f"ResNet-18 b{asked.batch} {asked.size}px", name, times[name].median_ms, *shares, goal, True, note)
        )
    report("Realized speed-up in ONNX Runtime as a share of the MAC reduction", rows, asked.rounds, asked.json)


if __name__ == "__main__":
    main()
