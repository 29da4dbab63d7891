"""A network cut along the unit mask of a seed, and the proof that it is what mask-pool dropout trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.core.groups import Group, Groups
from secateur.core.targets import Targets, find_targets, unwrap
from secateur.errors import EquivalenceError, UsageError
from secateur.regularizers.mask_noise import MaskPoolNoise
from secateur.regularizers.mask_pool import MaskPoolDropout, unit_mask
from secateur.surgery.cut import cut_
from secateur.surgery.engine import trace_groups
from secateur.surgery.plan import Plan, make_plan
from secateur.surgery.verify import cut_verified_, outputs_in_eval
from secateur.variants.kinds import UnitMasks, Variant
from secateur.variants.workbench import Workbench

__all__ = ["PROOF_INPUTS", "MaskCut", "cut_by_mask", "cuttable", "pool_masks", "removable", "removed_share"]

# Images that explorations compare on.
PROOF_INPUTS = 64
# Largest |training mode - cut| accepted, relative to the largest output; as `cut_verified_` accepts.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_COARSE = 5e-2


@dataclass(frozen=True)
class MaskCut:
    """A network cut along a mask, and how well that was checked.

    Args:
        network: the smaller network, in eval mode; the one given is left as it was.
        plan: what was cut, for `save_pruned`; None where nothing was.
        kept: target name -> which of its units the mask keeps, bool `[units]`, True = kept.
        parameters_before, parameters_after: numbers of parameters.
        max_abs_diff: largest difference between the outputs of the network in training mode under the mask and of the
            cut one.
        scale: largest absolute output in training mode.
        tolerance: largest `max_abs_diff / scale` accepted.
        inputs: how many inputs were compared.
    """

    network: nn.Module
    plan: Plan | None
    kept: Mapping[str, Tensor]
    parameters_before: int
    parameters_after: int
    max_abs_diff: float
    scale: float
    tolerance: float
    inputs: int

    @property
    def removed(self) -> float:
        """Share of the parameters that is gone."""
        return 1.0 - self.parameters_after / self.parameters_before


def cut_by_mask(
    model: nn.Module,
    drop_rate: float,
    seed: int,
    inputs: Tensor,
    *,
    targets: Targets | None = None,
    groups: Groups | None = None,
    min_keep: int = 1,
    tolerance: float | None = None,
) -> MaskCut:
    """A copy of `model` without the units that mask `seed` drops, the others multiplied by 1 / (1 - drop_rate).

    The factor goes into the weight and bias of each layer, or into the scale and shift of the BatchNorm that follows
    it. A unit is removed with everything that depends on it, so a convolution in front of a flatten takes its
    columns of the linear layer along. The copy is compared with the network in training mode under the mask:
    mask-pool dropout attached, this seed, BatchNorm with its running statistics.

    Each layer has a mask of its own. Where several layers make the same units (residual sums), a unit is removed if
    the masks of all of them drop it, and else stays, with zeros from the layers that drop it; so less is removed than
    the masks drop, and the network is still the one trained. With the targets of `groups.inner()` alone, such layers
    are left whole instead. Where blocks must keep equally many units (grouped convolutions), what is too many stays,
    as zeros.

    Args:
        model: the network, trained under mask-pool dropout or not.
        drop_rate: in [0, 1). At 0 the copy is the network itself.
        seed: of the mask.
        inputs: real ones, at least two, to compare on.
        targets: layers that are masked, those trained so; default: every prunable one but the last.
        groups: what may be cut; default: traced from `inputs`.
        min_keep: as in `MaskPoolDropout`.
        tolerance: largest difference accepted, relative to the largest output; default 1e-4, 1e-10 for float64.

    Raises:
        UsageError: a layer's units cannot be removed, and its mask drops some (the output layer, for instance).
        EquivalenceError: the cut network computes something else. A unit that is zero must be nothing to whatever
            reads it: an activation with f(0) other than 0, a LayerNorm over the units, a depthwise convolution that
            is no target. VacuousProofError: the same output for all inputs, which proves nothing.

    Cost: two copies of the network, and four forward passes.
    Reference: mask-guided structured pruning (thesis), equations 12-16 with p = drop_rate.
    """
    network = unwrap(model)
    targets = find_targets(network, exclude=["@last"]) if targets is None else targets
    groups = trace_groups(network, inputs[:1]) if groups is None else groups
    kept = pool_masks(targets, drop_rate, seed, min_keep)
    chosen = removable(groups, targets, kept)
    small = _with(network, UnitMasks(drop_rate, seed, min_keep), targets, inputs)
    plan = None if all(bool(k.all()) for k in chosen.values()) else make_plan(small, groups, chosen)
    before = _count(small)
    if plan is not None:
        cut_verified_(small, plan, inputs, tolerance=tolerance)
    expected = _in_training(network, MaskPoolDropout(drop_rate, None, min_keep), targets, seed, inputs)
    difference, scale, limit = _compare(expected, outputs_in_eval(small, inputs), tolerance)
    if not difference <= limit * scale:
        raise EquivalenceError(
            f"cut along mask {seed}: max |training mode - cut| = {difference:.3g} where outputs reach {scale:.3g}, "
            f"expected at most {limit:g} of that; a dropped unit is not nothing to what reads it (an activation with "
            "f(0) other than 0, a norm over units, a depthwise convolution), so leave its layer out of the targets"
        )
    return MaskCut(small, plan, kept, before, _count(small), difference, scale, limit, len(inputs))


def pool_masks(targets: Targets, drop_rate: float, seed: int, min_keep: int = 1) -> dict[str, Tensor]:
    """The masks of a seed, by target name: bool, `[units]`, True = kept."""
    return {t.name: unit_mask(seed, t.name, t.units, drop_rate, min_keep) for t in targets}


def cuttable(groups: Groups, targets: Targets) -> None:
    """Raise `UsageError` unless every target makes units of a group that may be cut."""
    for target in targets:
        names = (target.name, *target.aliases)
        group = next((g for g in groups if any(n == g.name or n in g.producers for n in names)), None)
        if group is None:
            why = "they make no group of their own (a depthwise convolution's go with those in front of it)"
        elif group.blocked is not None:
            why = group.blocked
        else:
            continue
        raise UsageError(
            f'mask of layer "{target.module}" cannot be cut: its units cannot be removed, {why}; exclude the layer'
        )


def removable(groups: Groups, targets: Targets, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which units of each group stay if the units of each target that `kept` does not keep are zero.

    Args:
        kept: target name -> bool `[units]`, True = kept.

    Returns: group name -> bool `[units]`; a unit goes where all layers that make it drop it.

    Raises: `UsageError` as `cuttable`.
    """
    cuttable(groups, targets)
    names = {alias: t.name for t in targets for alias in (t.name, *t.aliases)}
    return {
        group.name: _stays(group, {p: kept[names[p]] for p in group.producers if p in names})
        for group in groups
        if any(p in names for p in group.producers)
    }


def removed_share(model: nn.Module, plan: Plan | None) -> float:
    """Share of the parameters that a plan removes; counted without memory for them, on the `meta` device."""
    if plan is None:
        return 0.0
    small = copy.deepcopy(model).to("meta")
    report = cut_(small, plan)
    return 1.0 - report.parameters_after / report.parameters_before


def _stays(group: Group, kept: Mapping[str, Tensor]) -> Tensor:
    stays = np.zeros(group.units, dtype=bool)
    for member in group.members:
        if member.path in kept:
            stays |= kept[member.path].numpy()[member.index].any(axis=1)
        elif member.path in group.producers:
            # A layer that is no target drops nothing.
            stays[:] = True
    rows = stays.reshape(group.blocks, -1)
    most = int(rows.sum(axis=1).max())
    for row in rows:
        spare = np.flatnonzero(~row)[: most - int(row.sum())]
        row[spare] = True
    return torch.from_numpy(rows.reshape(-1))


def _with(network: nn.Module, variant: Variant, targets: Targets, inputs: Tensor) -> nn.Module:
    """A copy of the network with a variant's weights for its own."""
    with Workbench(network, targets, batches=[inputs]).variant(variant) as changed:
        return copy.deepcopy(changed).eval()


class _OneMask(MaskPoolNoise):
    """Mask-pool dropout that takes the same mask in every pass."""

    def __init__(self, spec: MaskPoolDropout, model: nn.Module, targets: Targets, mask_seed: int) -> None:
        super().__init__(spec, model, targets, 0)
        self.mask_seed = mask_seed

    def draw(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self.mask_seed is not None
        if self.drop_rate:
            self._masks.update(self._make(self.mask_seed))


def _in_training(
    network: nn.Module, spec: MaskPoolDropout, targets: Targets, seed: int, inputs: Tensor
) -> list[Tensor]:
    twin = copy.deepcopy(network).eval()
    with _OneMask(spec, twin, targets, seed) as attachment, attachment.sampling():
        return outputs_in_eval(twin, inputs)


def _compare(expected: list[Tensor], got: list[Tensor], tolerance: float | None) -> tuple[float, float, float]:
    """Largest difference, largest output and relative tolerance, of the output that differs most."""
    found = [(0.0, 0.0, 0.0)]
    for a, b in zip(expected, got, strict=True):
        if a.is_floating_point() and a.numel():
            difference = float((a.double() - b.double()).abs().max())
            limit = _TOLERANCE.get(a.dtype, _COARSE) if tolerance is None else tolerance
            found.append((difference if math.isfinite(difference) else math.inf, float(a.abs().max()), limit))
    # The last of equal ones: the first is that of a network without outputs.
    return max(reversed(found), key=lambda f: f[0] / f[1] if f[1] else f[0])


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
