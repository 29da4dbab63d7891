"""One row of a result: a pruned network, evaluated and counted."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from secateur.analysis.cost import Cost, measure_cost
from secateur.core.groups import Groups
from secateur.core.masks import Masks
from secateur.errors import VacuousProofError
from secateur.lab.context import Context
from secateur.lab.recipe import PruneSpec
from secateur.lab.report.schema import Row
from secateur.lab.store import Stage
from secateur.surgery.cut import cut_
from secateur.surgery.plan import make_plan
from secateur.surgery.verify import cut_verified_
from secateur.variants.renew import renew_statistics_

__all__ = ["checked_row", "cut_copy", "recalibrate_", "small_row", "stored_rows", "unit_row", "weight_row"]

_PROOF_INPUTS = 16


def weight_row(
    context: Context, model: nn.Module, masks: Masks, dense: Cost, spec: PruneSpec, sparsity: float
) -> dict[str, Any]:
    """The row of a network whose weights `masks` has set to zero."""
    return {
        **_row(context, model, spec, sparsity),
        "sparsity_got": masks.sparsity,
        "params_total": dense.params,
        "params_kept": dense.params - (masks.total - masks.kept),
        "macs": dense.macs,  # zeros are multiplied like any other number: only a cut saves MACs
        "layers": [{"name": n, "kept": kept, "total": size} for n, kept, size in masks.layers()],
    }


def unit_row(
    context: Context,
    model: nn.Module,
    groups: Groups,
    kept: Mapping[str, Tensor],
    dense: Cost,
    spec: PruneSpec,
    sparsity: float,
) -> dict[str, Any]:
    """The row of a cut copy of `model`, left as it is, with the proof that the cut was exact."""
    smaller, difference = cut_copy(context, model, groups, kept)
    return {**small_row(context, smaller, kept, dense, spec, sparsity), "max_abs_diff": difference}


def small_row(
    context: Context, smaller: nn.Module, kept: Mapping[str, Tensor], dense: Cost, spec: PruneSpec, sparsity: float
) -> dict[str, Any]:
    """The row of a network that has only the kept units."""
    cost = measure_cost(smaller, context.example(1))
    units = sum(k.numel() for k in kept.values())
    return {
        **_row(context, smaller, spec, sparsity),
        "sparsity_got": 1.0 - sum(int(k.sum()) for k in kept.values()) / units,
        "params_total": dense.params,
        "params_kept": cost.params,
        "macs": cost.macs,
        "layers": [{"name": n, "kept": int(k.sum()), "total": k.numel()} for n, k in kept.items()],
    }


def cut_copy(
    context: Context, model: nn.Module, groups: Groups, kept: Mapping[str, Tensor]
) -> tuple[nn.Module, float | None]:
    """A cut copy of `model`, and max |masked - cut| on test images; the plain copy and 0 if nothing goes.

    The difference is None for a network so far gone that it gives one answer to everything: it is cut all the
    same, because its accuracy is a result too, but no comparison could prove anything.
    """
    smaller = copy.deepcopy(model)
    if all(bool(k.all()) for k in kept.values()):
        return smaller, 0.0
    plan = make_plan(smaller, groups, dict(kept))
    try:
        return smaller, cut_verified_(smaller, plan, context.example(_PROOF_INPUTS)).max_abs_diff
    except VacuousProofError:
        cut_(smaller, plan)
        return smaller, None


def stored_rows(stage: Stage) -> list[dict[str, Any]]:
    """The rows that a finished stage holds; `CheckpointError` if they are none."""
    return [checked_row(stage, row) for row in stage.result(rows=list)["rows"]]


def checked_row(stage: Stage, row: Any) -> dict[str, Any]:
    """A row that a finished stage holds, once it has all that is read from it later."""
    try:
        _StoredRow.model_validate(row)
    except ValidationError as error:
        raise stage.damaged("holds something that is no row of a result") from error
    return dict(row)


class _StoredRow(Row):
    method: str = ""
    seed: int = 0
    sparsity_got: float
    validation_top1: float | None


def _row(context: Context, model: nn.Module, spec: PruneSpec, sparsity: float) -> dict[str, Any]:
    if spec.recalibrate:
        recalibrate_(model, context)
    tested, validated = context.test(model), context.validate(model)
    return {
        "granularity": spec.granularity,
        "criterion": spec.title,
        "scope": spec.scope,
        "control": spec.control,
        "sparsity_asked": sparsity,
        "top1": tested.top1,
        "correct": tested.correct,
        "count": tested.count,
        "top5": tested.top5,
        "validation_top1": validated.top1 if validated else None,
        "retrained": False,
    }


def recalibrate_(model: nn.Module, context: Context) -> None:
    """Re-estimate every BatchNorm's running statistics as plain averages over the training set."""
    renew_statistics_(model, context.training_batches())
