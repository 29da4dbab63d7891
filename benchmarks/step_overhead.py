"""What a regularizer adds to a training step: ratio to the plain step (SGD with momentum).

    python benchmarks/step_overhead.py [--rounds 15] [--compiled] [--json FILE]

Beside ours, in-graph forms of the methods as they are usually written: a parametrization that sorts and draws
inside autograd, and a BatchNorm hook that ranks and draws in every forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from _paired import Row, parser, ratios, report, steady, timed_rounds
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torchvision.models import VisionTransformer

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.lab.models import build_model
from secateur.regularizers.base import Regularizer
from secateur.regularizers.ddrop import DDrop
from secateur.regularizers.dropout import Dropout
from secateur.regularizers.l0 import L0
from secateur.regularizers.l1 import L1
from secateur.regularizers.mask_pool import MaskPoolDropout
from secateur.regularizers.pgmpf import PGMPF
from secateur.regularizers.smallify import Smallify
from secateur.regularizers.soft_filter_pruning import SoftFilterPruning
from secateur.regularizers.targeted_dropout import TargetedDropout
from secateur.regularizers.variational_dropout import VariationalDropout

Method = Regularizer | Callable[[nn.Module], None]

GAMMA, ALPHA = 0.75, 0.66
PLAIN = "plain step"


@dataclass(frozen=True)
class Case:
    """A network, its batch, how many steps make one run, and the goal of each method."""

    name: str
    model: nn.Module
    batch: Tensor
    steps: int
    goals: dict[str, float]
    goals_compiled: dict[str, float]
    leave_out: tuple[str, ...] = ()


class SortedTargetedDropout(nn.Module):
    """Weight-level Targeted Dropout inside the graph, by a full sort of every unit's weights."""

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight
        size = weight.flatten(1).abs()
        k = int(GAMMA * size.shape[1])
        threshold = size.sort(dim=1).values[:, k - 1 : k]
        dropped = (size <= threshold) & (torch.rand_like(size) < ALPHA)
        return weight * (~dropped).reshape(weight.shape)


class SortedTargetedUnitDropout(nn.Module):
    """Unit-level Targeted Dropout inside the graph."""

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training:
            return weight
        norm = weight.flatten(1).norm(dim=1)
        k = int(GAMMA * norm.numel())
        dropped = (norm <= norm.sort().values[k - 1]) & (torch.rand_like(norm) < ALPHA)
        return weight * (~dropped).reshape(-1, *[1] * (weight.dim() - 1))


def naive_weights(form: type[nn.Module]) -> Callable[[nn.Module], None]:
    def attach(model: nn.Module) -> None:
        for module in list(model.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):
                parametrize.register_parametrization(module, "weight", form())

    return attach


def naive_ddrop(model: nn.Module) -> None:
    def drop(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        rank = module.weight.abs().argsort().argsort()
        keep = 0.6 + 0.4 * rank / (rank.numel() - 1)
        mask = torch.rand(output.shape[:2]) < keep
        return output * mask[:, :, None, None]

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(drop)


def ours() -> dict[str, Regularizer]:
    return {
        "targeted dropout, weight": TargetedDropout(GAMMA, ALPHA),
        "targeted dropout, unit": TargetedDropout(GAMMA, ALPHA, granularity="unit"),
        "dropout, weight": Dropout(0.5),
        "dropout, unit": Dropout(0.5, granularity="unit"),
        "ddrop": DDrop(l1=0.0),
        "ddrop with L1": DDrop(),
        "mask pool": MaskPoolDropout(),
        "l1": L1(),
        "soft filter pruning": SoftFilterPruning(),
        "pgmpf": PGMPF(),
        "l0, unit": L0(),
        "smallify, unit": Smallify(),
        "l0, weight": L0(granularity="weight"),
        "variational dropout": VariationalDropout(),
    }


def naive() -> dict[str, Callable[[nn.Module], None]]:
    return {
        "naive targeted dropout, weight": naive_weights(SortedTargetedDropout),
        "naive targeted dropout, unit": naive_weights(SortedTargetedUnitDropout),
        "naive ddrop": naive_ddrop,
    }


def cases() -> list[Case]:
    resnet = build_model("resnet20", num_classes=10, in_shape=(3, 32, 32))
    for parameter in (m.weight for m in resnet.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(parameter)  # equal scales would be one large tie
    mlp = build_model("mlp", num_classes=10, in_shape=(1, 28, 28), kwargs={"hidden": [512, 512]})
    free = ("targeted dropout, weight", "targeted dropout, unit", "dropout, weight", "dropout, unit", "ddrop")
    free = (*free, "mask pool", "l1", "soft filter pruning", "pgmpf")
    compiled = dict.fromkeys(free, 1.01)
    goals = {
        **dict.fromkeys(free, 1.02),
        **dict.fromkeys(("l0, unit", "smallify, unit"), 1.03),
        "l0, weight": 1.06,
        "variational dropout": 2.2,
    }
    vit = VisionTransformer(
        image_size=32, patch_size=4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=10
    )
    return [
        Case("ResNet-20 b128 32x32", resnet, torch.randn(128, 3, 32, 32), 1, goals, compiled),
        # Gates and units of attention are refused by some methods, so all act on the other layers here.
        Case("ViT 192x6 b64 32x32", vit, torch.randn(64, 3, 32, 32), 1, goals, compiled, ("*attention*",)),
        Case("MLP 784-512-512-10 b128", mlp, torch.randn(128, 1, 28, 28), 20, {"targeted dropout, weight": 1.45}, {}),
    ]


def stepper(case: Case, method: Method | None, compiled: bool) -> Callable[[], None]:
    """A run of `case.steps` training steps on a private copy of the network."""
    model = copy.deepcopy(case.model).train()
    forward = torch.compile(model) if compiled else model
    attached = None
    if isinstance(method, Regularizer):
        targets = find_targets(model, exclude=case.leave_out, kind=method.acts_on)
        attached = method.attach(forward, targets, seed=0)
    elif method is not None:
        method(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.arange(len(case.batch)) % 10

    def run() -> None:
        for step in range(case.steps):
            optimizer.zero_grad(set_to_none=True)
            loss = nn.functional.cross_entropy(forward(case.batch), labels)
            if attached is not None:
                loss = loss + attached.penalty()
            loss.backward()
            optimizer.step()
            if attached is not None:
                attached.after_step(Progress(step, 10**6, 1000))

    return run


def measure(case: Case, rounds: int, compiled: bool, only: str = "") -> list[Row]:
    methods: dict[str, Method | None] = {PLAIN: None, **ours(), **naive()}
    if not any(isinstance(m, nn.BatchNorm2d) for m in case.model.modules()):
        methods = {name: m for name, m in methods.items() if "ddrop" not in name}
    methods = {name: m for name, m in methods.items() if only in name or name == PLAIN}
    runs = {name: stepper(case, method, compiled) for name, method in methods.items()}
    times = timed_rounds(runs, rounds, warm=2)
    goals = case.goals_compiled if compiled else case.goals
    return [
        Row(case.name, name, median(t) / case.steps, *ratios(t, times[PLAIN]), goal=goals.get(name))
        for name, t in times.items()
    ]


def main() -> None:
    flags = parser(__doc__, rounds=15)
    flags.add_argument("--compiled", action="store_true", help="everything under torch.compile, plain step included")
    flags.add_argument("--case", default="", help="only cases whose name contains this")
    flags.add_argument("--method", default="", help="only methods whose name contains this")
    asked = flags.parse_args()
    steady()
    if asked.compiled:
        # Every method has a graph of its own here, told apart by its hooks.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        torch._dynamo.config.recompile_limit = 64
    chosen = [case for case in cases() if asked.case in case.name]
    rows = [row for case in chosen for row in measure(case, asked.rounds, asked.compiled, asked.method)]
    title = f"Training step, ratio to the plain step{' (both compiled)' if asked.compiled else ''}"
    report(title, rows, asked.rounds, asked.json)


if __name__ == "__main__":
    main()
