"""What activation statistics add to a forward pass, exact and in O(channels) memory.

    python benchmarks/activation_statistics.py [--rounds 9] [--json FILE]

Each goes through `gather_evidence` on four batches. The ratio is to plain forward passes over the same batches with
a no-op hook on every layer. Beside ours, the usual form: hooks that call abs().mean(), var() and (a == 0).mean().
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from _paired import Row, parser, ratios, report, steady, timed_rounds
from torch import Tensor, nn

from secateur.core.targets import find_targets
from secateur.criteria.driver import gather_evidence
from secateur.lab.models import build_model

WANTED = ("mean_abs", "variance", "zero_fraction")
PLAIN = "plain forward"
BATCHES = 4


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def plain(model: nn.Module, batch: Tensor) -> Callable[[], Any]:
    def run() -> None:
        handles = [m.register_forward_hook(lambda *_: None) for m in layers(model)]
        with torch.no_grad():
            for _ in range(BATCHES):
                model(batch)
        for handle in handles:
            handle.remove()

    return run


def ours(model: nn.Module, batch: Tensor, needs: frozenset[Any]) -> Callable[[], Any]:
    targets = find_targets(model)
    return lambda: gather_evidence(model, targets, needs, batches=[batch] * BATCHES)


def usual(model: nn.Module, batch: Tensor) -> Callable[[], Any]:
    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        axes = [0, *range(2, output.dim())]
        kept[module] = (output.abs().mean(axes), output.var(axes), (output == 0).float().mean(axes))

    kept: dict[nn.Module, tuple[Tensor, ...]] = {}

    def run() -> None:
        handles = [m.register_forward_hook(look) for m in layers(model)]
        with torch.no_grad():
            for _ in range(BATCHES):
                model(batch)
        for handle in handles:
            handle.remove()

    return run


def cases() -> dict[str, tuple[nn.Module, Tensor]]:
    import torchvision

    cifar = {"num_classes": 10, "in_shape": (3, 32, 32)}
    mlp = build_model("mlp", num_classes=10, in_shape=(1, 28, 28), kwargs={"hidden": [512, 512]})
    return {
        "ResNet-20 b128 32x32": (build_model("resnet20", **cifar), torch.randn(128, 3, 32, 32)),
        "ResNet-18 b64 64x64": (torchvision.models.resnet18(num_classes=10), torch.randn(64, 3, 64, 64)),
        "VGG-16-BN b64 32x32": (build_model("vgg16", **cifar), torch.randn(64, 3, 32, 32)),
        "MLP b1000": (mlp, torch.randn(1000, 1, 28, 28)),
    }


def measure(case: str, model: nn.Module, batch: Tensor, rounds: int) -> list[Row]:
    model.eval()
    runs = {
        PLAIN: plain(model, batch),
        "mean |a|": ours(model, batch, frozenset(["mean_abs"])),
        "mean |a|, variance, zeros": ours(model, batch, frozenset(WANTED)),
        "the usual three hooks": usual(model, batch),
    }
    goals = {"mean |a|": 1.05, "mean |a|, variance, zeros": 1.15}
    times = timed_rounds(runs, rounds, warm=2)
    return [Row(case, name, median(t), *ratios(t, times[PLAIN]), goal=goals.get(name)) for name, t in times.items()]


def main() -> None:
    flags = parser(__doc__, rounds=9)
    flags.add_argument("--case", default="", help="only cases whose name contains this")
    asked = flags.parse_args()
    steady()
    rows = [row for case, pair in cases().items() if asked.case in case for row in measure(case, *pair, asked.rounds)]
    report("Activation statistics, ratio to the plain forward pass", rows, asked.rounds, asked.json)


if __name__ == "__main__":
    main()
