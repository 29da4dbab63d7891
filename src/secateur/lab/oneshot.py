"""The whole way in one call, for someone with their own training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.analysis.cost import Cost, measure_cost
from secateur.analysis.inputs import as_args, with_batch
from secateur.core.groups import Groups
from secateur.core.masks import Masks
from secateur.core.targets import Targets
from secateur.criteria.base import Criterion
from secateur.criteria.driver import Loss
from secateur.criteria.magnitude import Magnitude
from secateur.sparsify.arguments import expect_criterion, expect_sparsity, expect_targets
from secateur.sparsify.ranking import SelectionRule, rank, rank_units
from secateur.surgery.cut import CutReport
from secateur.surgery.engine import trace_groups
from secateur.surgery.plan import Plan, align, make_plan
from secateur.surgery.verify import cut_verified_

__all__ = ["PruneReport", "prune_units_", "prune_weights"]


@dataclass(frozen=True)
class PruneReport:
    """What `prune_units_` did: asked and achieved, and the proof.

    Args:
        sparsity_asked, sparsity_got: fraction of units; they differ by rounding and alignment.
        dense, pruned: cost before and after.
        proof: max |masked - cut| on the inputs given.
        plan: what was cut; `save_pruned` needs it.
        multiple_of: what kept units were rounded up to.
    """

    sparsity_asked: float
    sparsity_got: float
    dense: Cost
    pruned: Cost
    proof: CutReport
    plan: Plan
    multiple_of: int = 1

    def __str__(self) -> str:
        rounded = self.multiple_of > 1 and self.sparsity_got < self.sparsity_asked
        why = f" (kept units rounded up to multiples of {self.multiple_of})" if rounded else ""
        return (
            f"asked {self.sparsity_asked:.1%} of units, removed {self.sparsity_got:.1%}{why}: "
            f"parameters {self.dense.params} -> {self.pruned.params} (x{self.dense.params / self.pruned.params:.2f}), "
            f"MACs {self.dense.macs} -> {self.pruned.macs} (x{self.dense.macs / max(1, self.pruned.macs):.2f}), "
            f"bytes {self.dense.bytes} -> {self.pruned.bytes}; max |masked - cut| = {self.proof.max_abs_diff:.2g}"
        )


def prune_weights(
    model: nn.Module,
    sparsity: float,
    *,
    criterion: Criterion | None = None,
    granularity: str = "weight",
    rule: SelectionRule | None = None,
    targets: Targets | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    learned: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Masks at `sparsity` by one criterion (magnitude by default). Apply them with `masks.apply_(model)`, keep
    them while training with `masks.hold(model, optimizer)`.

    Args:
        sparsity: fraction to remove, in [0, 1).
        criterion: default magnitude.
        granularity, rule, targets, batches, loss: as for `rank`.
        learned: what a regularizer's `scores()` said, by target name, for the criterion `Learned`.

    Examples:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> prune_weights(model, 0.75).sparsity
        0.75
    """
    criterion = Magnitude() if criterion is None else criterion
    _expect("prune_weights", sparsity, criterion, targets)
    ranking = rank(
        model,
        criterion,
        granularity=granularity,
        rule=rule,
        targets=targets,
        batches=batches,
        loss=loss,
        learned=learned,
    )
    return ranking.masks(sparsity)


def prune_units_(
    model: nn.Module,
    sparsity: float,
    inputs: Tensor | tuple[Any, ...],
    *,
    criterion: Criterion | None = None,
    rule: SelectionRule | None = None,
    targets: Targets | None = None,
    groups: Groups | None = None,
    multiple_of: int = 16,
    optimizer: Optimizer | None = None,
    ema: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    learned: Mapping[str, Tensor] | None = None,
) -> PruneReport:
    """Remove a fraction of the units of every dependency group for real, in place, and prove it.

    Args:
        model: the network; its parameters become smaller ones.
        sparsity: fraction of units to remove in each group, in [0, 1).
        inputs: a real batch (a tensor, or a tuple of positional arguments), on which masked and cut are compared.
        criterion: default magnitude (L2).
        groups: default: traced from `inputs`; pass `trace_groups(...).inner()` to leave residual sums alone.
        multiple_of: kept units are rounded up to a multiple of this where the layer has more, because other
            channel counts run slower, often slower than the wider layer; 1 = exactly as asked.
        optimizer, ema: carried along, so that training can go on.
        batches, loss: data for criteria that need it.
        learned: what a regularizer's `scores()` said, by target name, for the criterion `Learned`.

    Raises: `EquivalenceError` (nothing changed) if the cut network computes something else; `TraceError`.
    """
    criterion = Magnitude() if criterion is None else criterion
    _expect("prune_units_", sparsity, criterion, targets)
    one = with_batch(as_args(inputs), 1)
    groups = trace_groups(model, one) if groups is None else groups
    ranking = rank_units(
        model, criterion, groups, rule=rule, targets=targets, batches=batches, loss=loss, learned=learned
    )
    kept = ranking.kept(sparsity)
    if multiple_of > 1:
        kept = {
            name: align(keep, ranking.scores[name], multiple_of, blocks=groups[name].blocks)
            for name, keep in kept.items()
        }
    dense = measure_cost(model, one)
    plan = make_plan(model, groups, kept)
    proof = cut_verified_(model, plan, inputs, optimizer=optimizer, ema=ema)
    removed = sum(int((~k).sum()) for k in kept.values())
    got = removed / sum(k.numel() for k in kept.values())
    return PruneReport(sparsity, got, dense, measure_cost(model, one), proof, plan, multiple_of)


def _expect(call: str, sparsity: float, criterion: Criterion, targets: Targets | None) -> None:
    expect_sparsity(call, sparsity)
    expect_criterion(call, criterion)
    expect_targets(call, targets)
