"""How much more memory a training step takes with a regularizer, in multiples of the regularized weights.

    python benchmarks/step_memory.py [--json FILE]

The peak of resident memory over a few steps (SGD with momentum), each case in a fresh process, minus that of plain
steps; a network of 17 M weights and a batch of 8, so that weights are what counts. What is drawn for a step, the
multiplied copy of the weights, masks, the gradient and momentum of learned parameters are all in it; those parameters
themselves, which are there before the first step, and code that is loaded at its first use are not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _paired import Row, parser, peak_extra_bytes, report, steady
from step_overhead import ours
from torch import nn

from secateur.core.duration import Progress
from secateur.core.targets import find_targets

WIDTH, STEPS = 2048, 3
# At most one copy of the weights for methods on weights, none for methods on units; what learns a number per weight
# has its gradient and momentum besides.
GOALS = {"weight": 1.05, "learned weight": 3.05, "unit": 0.05}
LEVEL = {
    "targeted dropout, weight": "weight",
    "targeted dropout, unit": "unit",
    "dropout, weight": "weight",
    "dropout, unit": "unit",
    "ddrop": "unit",
    "mask pool": "unit",
    "l1": "weight",
    "soft filter pruning": "unit",
    "pgmpf": "unit",
    "l0, unit": "unit",
    "smallify, unit": "unit",
    "l0, weight": "learned weight",
    "variational dropout": "learned weight",
}


def network(width: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight)
    return model.train()


def steps(name: str) -> Callable[[], None]:
    # So that all code is loaded.
    training(name, 64)()
    return training(name, WIDTH)


def training(name: str, width: int) -> Callable[[], None]:
    model = network(width)
    method = ours().get(name)
    attached = None
    if method is not None:
        attached = method.attach(model, find_targets(model, kind=method.acts_on), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(8, width)

    def run() -> None:
        for step in range(STEPS):
            optimizer.zero_grad(set_to_none=True)
            loss = model(x).square().mean()
            if attached is not None:
                loss = loss + attached.penalty()
            loss.backward()
            optimizer.step()
            if attached is not None:
                attached.after_step(Progress(step, 10**6, 1000))

    return run


def main() -> None:
    asked = parser(__doc__, rounds=1).parse_args()
    steady()
    size = 4 * sum(t.numel for t in find_targets(network()))
    plain = peak_extra_bytes(steps, "plain step")
    rows = []
    for name, level in LEVEL.items():
        extra = (peak_extra_bytes(steps, name) - plain) / size
        rows.append(Row("17 M weights, batch 8", name, float("nan"), extra, extra, extra, GOALS[level], False, level))
    report("Extra memory of a training step, in multiples of the regularized weights", rows, asked.rounds, asked.json)


if __name__ == "__main__":
    main()
