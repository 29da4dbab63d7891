"""What feature variance and gradient flow add to the passes they are taken from.

    python benchmarks/analysis_passes.py [--rounds 9] [--case NAME] [--json FILE]

Each over four batches of a network. Feature variance is compared with plain forward passes, gradient flow with plain
forward and backward passes (cross-entropy, in eval mode as ours), over the same batches. Beside ours, the usual forms:
a hook that calls `output.var(0).sum()`, and the norm of the gradients that `backward` has added up.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from _paired import Row, parser, ratios, report, steady, timed_rounds
from torch import Tensor, nn

from secateur.analysis.feature_variance import feature_variance
from secateur.analysis.gradient_flow import gradient_flow
from secateur.lab.models import build_model

BATCHES, GOAL = 4, 1.15
FORWARD, BACKWARD = "plain forward", "plain forward and backward"


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@torch.no_grad()
def forward(model: nn.Module, x: Tensor) -> None:
    for _ in range(BATCHES):
        model(x)


@torch.no_grad()
def variance_by_hooks(model: nn.Module, x: Tensor) -> None:
    found: list[Tensor] = []
    handles = [m.register_forward_hook(lambda *call: found.append(call[2].var(0).sum())) for m in layers(model)]
    for _ in range(BATCHES):
        model(x)
    for handle in handles:
        handle.remove()


def backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    model.zero_grad()
    for _ in range(BATCHES):
        nn.functional.cross_entropy(model(x), y).backward()


def norm_by_backward(model: nn.Module, x: Tensor, y: Tensor) -> None:
    backward(model, x, y)
    torch.stack([m.weight.grad.norm() for m in layers(model)]).norm().item()
    model.zero_grad()


def cases() -> dict[str, tuple[nn.Module, Tensor]]:
    cifar = {"num_classes": 10, "in_shape": (3, 32, 32)}
    mlp = build_model("mlp", num_classes=10, in_shape=(1, 28, 28), kwargs={"hidden": [512, 512]})
    return {
        "ResNet-20 b128 32x32": (build_model("resnet20", **cifar), torch.randn(128, 3, 32, 32)),
        "MLP b1000": (mlp, torch.randn(1000, 1, 28, 28)),
    }


def measure(case: str, model: nn.Module, x: Tensor, rounds: int) -> list[Row]:
    model.eval()
    y = torch.randint(10, (len(x),))
    runs: dict[str, dict[str, Callable[[], Any]]] = {
        FORWARD: {
            FORWARD: lambda: forward(model, x),
            "feature variance": lambda: feature_variance(model, [x] * BATCHES),
            "feature variance, usual hooks": lambda: variance_by_hooks(model, x),
        },
        BACKWARD: {
            BACKWARD: lambda: backward(model, x, y),
            "gradient flow": lambda: gradient_flow(model, [(x, y)] * BATCHES),
            "gradient flow, usual norm": lambda: norm_by_backward(model, x, y),
        },
    }
    goals = {"feature variance": GOAL, "gradient flow": GOAL} if case.startswith("ResNet") else {}
    rows = []
    for plain, variants in runs.items():
        times = timed_rounds(variants, rounds, warm=1)
        rows += [
            Row(case, name, median(t), *ratios(t, times[plain]), goal=goals.get(name)) for name, t in times.items()
        ]
    return rows


def main() -> None:
    flags = parser(__doc__, rounds=9)
    flags.add_argument("--case", default="", help="only cases whose name contains this")
    asked = flags.parse_args()
    steady()
    rows = [row for case, pair in cases().items() if asked.case in case for row in measure(case, *pair, asked.rounds)]
    title = "Analysis passes, ratio to the plain forward pass, or forward and backward"
    report(title, rows, asked.rounds, asked.json)


if __name__ == "__main__":
    main()
