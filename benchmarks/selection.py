"""Exact global magnitude masks at 90 % sparsity, against torch.nn.utils.prune.global_unstructured.

    python benchmarks/selection.py [--rounds 7] [--json FILE]

Times the call a user makes (score, select, masks) on the weights of ResNet-18 (11 M) and ResNet-50 (25 M);
checks that both give the identical mask; measures how far resident memory rises, in multiples of the weights.
The ratio is a speed-up: peer time / our time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from _paired import Row, parser, peak_extra_bytes, ratios, report, steady, timed_rounds
from torch import nn
from torch.nn.utils import prune

from secateur.core.masks import Masks
from secateur.criteria.magnitude import Magnitude
from secateur.sparsify.ranking import SelectionRule, rank

SPARSITY = 0.9
# torch counts round(s n), so "nearest" is the rule to compare with.
RULE = SelectionRule(scope="global", rounding="nearest")
SHAPES = {"11 M (ResNet-18)": "resnet18", "25 M (ResNet-50)": "resnet50"}


def network(name: str) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None)


def weights(model: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def by_secateur(model: nn.Module) -> Masks:
    return rank(model, Magnitude(), granularity="weight", rule=RULE).masks(SPARSITY)


def by_torch(model: nn.Module) -> None:
    prune.global_unstructured(weights(model), pruning_method=prune.L1Unstructured, amount=SPARSITY)


def undo(model: nn.Module) -> None:
    """Give the pruned module its plain weights back, so that the next round starts alike."""
    for module, name in weights(model):
        module.weight = module._parameters.pop("weight_orig")
        module._buffers.pop("weight_mask")
        module._forward_pre_hooks.clear()
        module._parameters.move_to_end(name) if hasattr(module._parameters, "move_to_end") else None


def ready(action: Callable[[nn.Module], Any], name: str) -> Callable[[], Any]:
    """For the memory measurement: `action`, warmed up on a small network, ready to run on `name`."""
    action(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    model = network(name)
    return lambda: action(model)


def measure(case: str, name: str, rounds: int) -> list[Row]:
    size = 4 * sum(m.weight.numel() for m, _ in weights(network(name)))
    extra = {f.__name__: peak_extra_bytes(ready, f, name) / size for f in (by_secateur, by_torch)}

    model, peer = network(name), network(name)
    masks = by_secateur(model)
    by_torch(peer)
    paths = {id(m): path for path, m in peer.named_modules()}
    same = all(torch.equal(masks[f"{paths[id(m)]}.weight"], m.weight_mask.bool()) for m, _ in weights(peer))

    def theirs() -> None:
        by_torch(peer)

    runs: dict[str, Callable[[], Any]] = {"secateur": lambda: by_secateur(model), "torch": theirs}
    undo(peer)
    times = timed_rounds(runs, rounds)
    return [Row(case, "torch.nn.utils.prune", 1, 1, 1, 1)]


if __name__ == "__main__":
    pass
