"""Which weights, or layers, the loss depends on together: the matrix w_i H_ij w_j, small enough to look at."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.analysis.hessian import hessian_form
from secateur.analysis.weight_dependence import WeightDependence, weight_dependence
from secateur.core.masks import Masks
from secateur.core.targets import Targets, find_targets
from secateur.errors import DataError, UsageError
from secateur.lab.explore.analyses_spec import AnalysesSpec
from secateur.lab.explore.session import Session

__all__ = ["check_paired", "dependence"]

# Weights that are paired one by one, at most; rows and columns of the picture; images at a time.
_WEIGHTS, _CELLS, _TOGETHER = 2000, 120, 128
_NOTHING: dict[str, Any] = {"of": "nothing", "matrix": [], "cells": [], "none": "all products of pairs are 0"}


def dependence(session: Session, spec: AnalysesSpec, kept: Callable[[float], Masks]) -> dict[str, Any]:
    """Of all pairs of weights where these are few enough, else of all pairs of layers.

    Args:
        kept: from a sparsity to the masks, by which pairs are told apart: both removed, one of them, both kept.
    """
    targets = _paired(session.network, session, spec)
    names = [target.module for target in targets]
    found: dict[str, Any] = {"layers": names, "weights": sum(t.numel for t in targets), "none": None}
    try:
        if found["weights"] > _WEIGHTS:
            between = _between_layers(session, spec, targets)
            if not any(value for row in between for value in row):
                return {**found, **_NOTHING}
            return {**found, "of": "layers", "matrix": between, "cells": []}
        batches = session.training_images(spec.images, min(_TOGETHER, spec.images))
        pairs = weight_dependence(session.network, batches, targets=targets, limit=_WEIGHTS)
    except (UsageError, DataError) as error:
        return {**found, **_NOTHING, "none": str(error)}
    size = pairs.matrix.abs()
    total = float(size.sum())
    if not total:
        return {**found, **_NOTHING}
    means, starts = _averaged(size, pairs)
    sparsities = [sparsity for sparsity in sorted(spec.sparsities) if sparsity]
    return {
        **found,
        "of": "weights",
        "matrix": [[float(f"{value:.4g}") for value in row] for row in means.tolist()],
        "starts": starts,
        "own": float(size.diagonal().sum()) / total,
        "within": sum(float(pairs.between(n, n).abs().sum()) for n in pairs.slices) / total,
        "cells": [{"sparsity": s, **_parted(size / total, pairs, kept(s))} for s in sparsities],
    }


def check_paired(session: Session, spec: AnalysesSpec) -> None:
    """Raise `UsageError` for layers that are named and cannot be paired weight by weight."""
    if not spec.paired:
        return
    network = session.context.model(session.recipe.seed)
    count = sum(target.numel for target in _paired(network, session, spec))
    if count > _WEIGHTS:
        raise UsageError(
            f"analyses: paired: these layers have {count} weights, expected at most {_WEIGHTS}; name fewer, or none "
            "for all pairs of layers"
        )


def _paired(network: nn.Module, session: Session, spec: AnalysesSpec) -> Targets:
    targets = find_targets(network, session.recipe.include, session.recipe.excluded)
    if not spec.paired:
        return targets
    paired = find_targets(network, spec.paired)
    if outside := [target.module for target in paired if target.name not in targets.names]:
        raise UsageError(
            f'analyses: paired: "{outside[0]}" is none of the layers that variants change; take it out of exclude, or '
            "into include"
        )
    return paired


def _between_layers(session: Session, spec: AnalysesSpec, targets: Targets) -> list[list[float]]:
    weights = {target.name: tensor.detach() for target, tensor in zip(targets, _tensors(session, targets), strict=True)}
    batches = session.training_images(spec.images, min(_TOGETHER, spec.images))
    pairs = hessian_form(session.network, batches, weights, pairs=True).pairs
    assert pairs is not None
    return [[pairs.get((a, b), 0.0) for b in weights] for a in weights]


def _tensors(session: Session, targets: Targets) -> list[Tensor]:
    found = targets.tensors(session.network)
    return [found[target.name] for target in targets]


def _averaged(size: Tensor, pairs: WeightDependence) -> tuple[Tensor, list[int]]:
    """Means over neighbors within a layer, and where each layer starts."""
    group = max(1, math.ceil(len(size) / _CELLS))
    starts: list[int] = []
    parts: list[Tensor] = []
    for rows in pairs.slices.values():
        starts.append(sum(len(part) for part in parts))
        cells = torch.arange(rows.start, rows.stop).tensor_split(math.ceil((rows.stop - rows.start) / group))
        part = torch.zeros(len(cells), len(size), dtype=size.dtype)
        for cell, members in enumerate(cells):
            part[cell, members] = 1.0 / len(members)
        parts.append(part)
    mean = torch.cat(parts)
    return mean @ size @ mean.T, starts


def _parted(shares: Tensor, pairs: WeightDependence, masks: Masks) -> dict[str, float]:
    """How much of the whole lies between weights that go, between such and others, and between those that stay."""
    kept = torch.cat([masks[name].flatten().cpu() for name in pairs.slices])
    removed, stay = float(shares[~kept][:, ~kept].sum()), float(shares[kept][:, kept].sum())
    # Of all ways to choose as many weights, the mean: any two different ones are told apart equally often.
    count, gone = len(kept), int((~kept).sum())
    chance = 2 * gone * (count - gone) / (count * (count - 1)) if count > 1 else 0.0
    return {
        "share_removed": gone / count,
        "removed": removed,
        "across": max(0.0, 1.0 - removed - stay),
        "kept": stay,
        "across_by_chance": chance * float(1.0 - shares.diagonal().sum()),
    }
