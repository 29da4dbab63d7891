"""Exact global magnitude masks at 90 % sparsity, against torch.nn.utils.prune.global_unstructured; LAMP against ours.

    python benchmarks/selection.py [--rounds 7] [--json FILE]

Times the call a user makes (score, select, masks) on the weights of ResNet-18 (11 M) and ResNet-50 (25 M),
checks that both give the identical mask, and measures how far resident memory rises while it runs. LAMP is timed
against our own magnitude under the same rule, and its masks are checked against those of its complete scores.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from _paired import Row, parser, peak_extra_bytes, ratios, report, steady, timed, timed_rounds
from torch import nn
from torch.nn.utils import prune

from secateur.core.masks import Masks
from secateur.criteria.lamp import Lamp
from secateur.criteria.magnitude import Magnitude
from secateur.sparsify.ranking import SelectionRule, rank

SPARSITY = 0.9
# The peer removes round(s n) weights wherever they are: "nearest", and no layer keeps a last one.
LIKE_PEER = SelectionRule(scope="global", rounding="nearest", min_keep=0)
DEFAULT = SelectionRule(scope="global")
NETWORKS = {"11 M (ResNet-18)": "resnet18", "25 M (ResNet-50)": "resnet50"}


def by_secateur(model: nn.Module) -> Masks:
    return rank(model, Magnitude(), granularity="weight", rule=LIKE_PEER).masks(SPARSITY)


def by_default(model: nn.Module) -> Masks:
    """As users call it: every layer keeps at least one weight."""
    return rank(model, Magnitude(), granularity="weight", rule=DEFAULT).masks(SPARSITY)


def by_lamp(model: nn.Module) -> Masks:
    return rank(model, Lamp(), granularity="weight", rule=LIKE_PEER).masks(SPARSITY)


def by_lamp_default(model: nn.Module) -> Masks:
    return rank(model, Lamp(), granularity="weight", rule=DEFAULT).masks(SPARSITY)


def by_complete_scores(model: nn.Module, rule: SelectionRule) -> Masks:
    """LAMP by its definition: every weight's score, then the lowest of them."""
    ranking = rank(model, Lamp(), granularity="weight", rule=rule)
    return replace(ranking, cells=dict(ranking.cells)).masks(SPARSITY)


def by_torch(model: nn.Module) -> Masks:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    parameters = [(m, "weight") for m in layers.values()]
    prune.global_unstructured(parameters, pruning_method=prune.L1Unstructured, amount=SPARSITY)
    return Masks({f"{name}.weight": module.weight_mask.bool() for name, module in layers.items()})


def network(name: str) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None)


def on_copy(action: Callable[[nn.Module], Masks], model: nn.Module) -> Callable[[], Masks]:
    """Ready to run on a fresh copy: the peer changes the module it prunes."""
    fresh = copy.deepcopy(model)
    return lambda: action(fresh)


def on_network(action: Callable[[nn.Module], Masks], name: str) -> Callable[[], Masks]:
    """The same for the memory measurement; a first small run pays for what is loaded once."""
    action(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    return on_copy(action, network(name))


def measure(case: str, name: str, rounds: int) -> list[Row]:
    actions = {"global_unstructured": by_torch, "ours, same rule": by_secateur, "ours, min_keep=1": by_default}
    model = network(name)
    size = 4 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    extra = {label: peak_extra_bytes(on_network, action, name) / size for label, action in actions.items()}
    theirs, ours, _ = (on_copy(action, model)() for action in actions.values())
    notes = {"ours, same rule": "mask identical" if theirs == ours else "mask DIFFERS"}
    prepared: dict[str, Callable[[], Any]] = {
        label: lambda action=action: on_copy(action, model) for label, action in actions.items()
    }
    times = timed_rounds(prepared, rounds, clock=lambda prepare: timed(prepare()))
    peer = times["global_unstructured"]
    rows = []
    for label, own in times.items():
        # The speed goal is for the identical mask; min_keep may have to select again.
        fast, small = (50.0 if label in notes else None), (None if own is peer else 0.3)
        rows.append(Row(case, f"speed-up: {label}", median(own), *ratios(peer, own), fast, True, notes.get(label, "")))
        e = extra[label]
        rows.append(Row(case, f"extra memory: {label}", median(own), e, e, e, small))
    return rows


def measure_lamp(case: str, name: str, rounds: int) -> list[Row]:
    pairs = {
        "lamp, global": (by_lamp, by_secateur, LIKE_PEER),
        "lamp, min_keep=1": (by_lamp_default, by_default, DEFAULT),
    }
    model = network(name)
    size = 4 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    rows = []
    for label, (lamp, magnitude, rule) in pairs.items():
        note = "mask identical" if lamp(model) == by_complete_scores(model, rule) else "mask DIFFERS"
        times = timed_rounds(
            {"lamp": lambda run=lamp: run(model), "magnitude": lambda run=magnitude: run(model)}, rounds
        )
        ratio = ratios(times["lamp"], times["magnitude"])
        extra = peak_extra_bytes(on_network, lamp, name) / size
        took = median(times["lamp"])
        rows.append(Row(case, f"over magnitude: {label}", took, *ratio, 3.0, note=note))
        rows.append(Row(case, f"extra memory: {label}", took, extra, extra, extra, 0.3))
    return rows


def main() -> None:
    asked = parser(__doc__, rounds=7).parse_args()
    steady()
    rows = []
    for case, name in NETWORKS.items():
        rows += measure(case, name, asked.rounds) + measure_lamp(case, name, asked.rounds)
    title = "Global masks, 90 %: speed-up over the peer, time over magnitude; extra memory in multiples of the weights"
    report(title, rows, asked.rounds, asked.json)
    if any("DIFFERS" in row.note for row in rows):
        raise SystemExit("masks differ from the peer's, or from those of the complete scores")


if __name__ == "__main__":
    main()
