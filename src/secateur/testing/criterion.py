"""The contract of a criterion."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any, get_args

import torch
from torch import Tensor, nn

from secateur.core.granularity import Unit, Weight
from secateur.core.targets import Targets, find_targets
from secateur.criteria.base import Criterion, Evidence, Need
from secateur.criteria.driver import cell_scores, gather_evidence, score_targets
from secateur.testing.networks import batches, convolutional, dense
from secateur.testing.snapshots import check_spec, generators, same_values, that, values

__all__ = ["check_criterion"]

_EVIDENCE = tuple(f.name for f in fields(Evidence) if f.name not in ("target", "seed"))


def check_criterion(criterion: Criterion, *, informed: bool | None = None) -> None:
    """Check everything the contract of a criterion promises.

    It is a frozen dataclass of plain values; declares its needs and reads no other evidence; returns finite scores
    of the right shape, the same every time, on linear, grouped, depthwise and transposed layers; changes neither
    the model (parameters, buffers, gradients, mode, hooks, flags), nor its evidence, nor the global generators.

    Args:
        criterion: the instance to check.
        informed: it looks at the network, so a dead unit (weights, bias and gamma zero) must rank last. False for
            controls that do not, such as random scores. Default: what its class says.

    Raises: `AssertionError` for the first promise that is broken.
    """
    name = check_spec(criterion)
    that(isinstance(criterion.needs, frozenset), f"{name}: needs is {criterion.needs!r}, expected a frozenset")
    beyond = criterion.wanted() - criterion.needs
    that(not beyond, f"{name}: wanted() has {sorted(beyond)}, which needs does not name")
    unknown = criterion.needs - set(get_args(Need))
    that(not unknown, f"{name}: needs {sorted(unknown)}, which the driver does not know; known: {get_args(Need)}")
    shapes = set(criterion.granularities)
    that(bool(shapes) and shapes <= {"weight", "unit"}, f"{name}: granularities {criterion.granularities!r}")
    that(criterion.pool in ("sum", "mean", "l1", "l2"), f"{name}: pool {criterion.pool!r} is not sum, mean, l1 or l2")
    for network in (dense(), convolutional()):
        # Its head has no BatchNorm behind it.
        targets = find_targets(network, exclude=["head"] if "norm" in criterion.needs else [])
        _check_scores(name, criterion, network, targets)
        if criterion.informed if informed is None else informed:
            _check_dead_unit(name, criterion, network, targets)


def _given(criterion: Criterion, network: nn.Module, targets: Targets) -> dict[str, Any]:
    """Data, and magnitudes for what a regularizer would have learned."""
    learned: dict[str, Tensor] = {n: p.detach().abs() for n, p in targets.tensors(network).items()}
    if "weight" not in criterion.granularities:
        learned = {t.name: t.rows(learned[t.name]).sum(1) for t in targets}
    return {"batches": batches(network), "learned": learned}


def _check_scores(name: str, criterion: Criterion, network: nn.Module, targets: Targets) -> None:
    before, untouched, shapes = values(network), generators(), set(criterion.granularities)
    try:
        given = _given(criterion, network, targets)
        first, again = (score_targets(network, targets, [criterion], **given)[0] for _ in range(2))
    except Exception as error:
        raise AssertionError(
            f"{name}: scoring {type(network).__name__} with the evidence it declares ({sorted(criterion.needs)}) "
            f"failed: {type(error).__name__}: {error}"
        ) from error
    same_values(f"{name}: scoring changed the model", before, values(network))
    that(untouched == generators(), f"{name}: scoring used or seeded a global random generator; key your own")
    for target in targets:
        score, where = first[target.name], f"{name}: score of {target.name} ({target.kind}, groups {target.groups})"
        that(score.is_floating_point(), f"{where} has dtype {score.dtype}, expected a float")
        that(bool(score.isfinite().all()), f"{where} is not finite")
        that(torch.equal(score, again[target.name]), f"{where} differs when computed again from the same data")
        expected = target.shape if "weight" in shapes else (target.units,)
        that(
            tuple(score.shape) == expected,
            f"{where} has shape {list(score.shape)}, which granularities {criterion.granularities} do not allow: "
            f"expected {list(expected)}",
        )
    for granularity in [Weight(), Unit()] if "weight" in shapes else [Unit()]:
        for key, cells in cell_scores(criterion, granularity, targets, first).items():
            expected = targets[key].shape if granularity == Weight() else (targets[key].units,)
            that(
                tuple(cells.shape) == expected,
                f"{name}: pooled to {granularity}, {key} has cells {list(cells.shape)}, expected {list(expected)}",
            )
    _check_evidence(name, criterion, network, targets)


def _check_evidence(name: str, criterion: Criterion, network: nn.Module, targets: Targets) -> None:
    for key, evidence in gather_evidence(
        network, targets, criterion.wanted(), **_given(criterion, network, targets)
    ).items():
        given = {f: getattr(evidence, f) for f in _EVIDENCE if getattr(evidence, f) is not None}
        copies = {f: tensor.clone() for f, tensor in given.items()}
        criterion.score(evidence)
        for field, tensor in given.items():
            that(torch.equal(tensor, copies[field]), f"{name}: score wrote into evidence.{field} of {key}")


@torch.no_grad()
def _check_dead_unit(name: str, criterion: Criterion, network: nn.Module, targets: Targets) -> None:
    dead = 1
    network = copy.deepcopy(network)
    for target in targets:
        weight = network.get_parameter(target.name)
        rows = target.rows(weight).clone()
        rows[dead] = 0.0
        weight.copy_(target.unrows(rows))
        if target.bias is not None:
            network.get_parameter(target.bias)[dead] = 0.0
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.weight[dead] = module.bias[dead] = 0.0
    (scores,) = score_targets(network, targets, [criterion], **_given(criterion, network, targets))
    for key, cells in cell_scores(criterion, Unit(), targets, scores).items():
        cells = cells.abs() if criterion.absolute else cells
        that(
            bool(cells[dead] <= cells.min()),
            f"{name}: in {key} a dead unit scores {float(cells[dead]):g}, above the lowest {float(cells.min()):g}; "
            "higher must mean keep (pass informed=False for a control that ignores the network)",
        )
