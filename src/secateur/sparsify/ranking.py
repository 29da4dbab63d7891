"""A network's cells, scored once; masks at any sparsity from the same scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.allocation import allocate
from secateur.core.granularity import Granularity, NofM, Unit, Weight, parse_granularity
from secateur.core.groups import Group, Groups, unit_masks
from secateur.core.masks import Masks
from secateur.core.select import Rounding, Scope, Ties, prune_count, select
from secateur.core.tail_share import TailShares, select_tail_shares
from secateur.core.targets import Targets, find_targets
from secateur.criteria.base import Criterion
from secateur.criteria.driver import Loss, cell_scores, score_targets
from secateur.errors import NoEffectError, UsageError
from secateur.sparsify.arguments import expect_criterion

__all__ = ["Ranking", "SelectionRule", "UnitRanking", "rank", "rank_units"]


@dataclass(frozen=True)
class SelectionRule:
    """How scores become masks; see `secateur.core.select.select` for scope, rounding, min_keep and ties.

    Args:
        allocation: `"uniform"`, `"erk"` or a mapping (not with scope `"global"`).
    """

    scope: Scope = "tensor"
    allocation: str | Mapping[str, float] = "uniform"
    rounding: Rounding = "prune_floor"
    min_keep: int = 1
    ties: Ties = "index"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scope == "global" and self.allocation != "uniform":
            raise UsageError(
                f'scope "global" shares the sparsity out by score, so it takes no allocation, got {self.allocation!r}; '
                'use scope "tensor"'
            )

    def select(
        self, cells: Mapping[str, Tensor], sparsity: float | Mapping[str, float], absolute: bool
    ) -> dict[str, Tensor]:
        return select(
            cells,
            sparsity,
            scope=self.scope,
            rounding=self.rounding,
            min_keep=self.min_keep,
            ties=self.ties,
            seed=self.seed,
            absolute=absolute,
        )


@dataclass(frozen=True)
class Ranking:
    """Scored cells of every target. `masks(sparsity)` is cheap and exact; sparsities are nested.

    Criteria that say `absolute` or `tail_share` rank the model's weights themselves, as they are when `masks` is
    called.
    """

    targets: Targets
    cells: Mapping[str, Tensor]
    granularity: Granularity
    rule: SelectionRule
    absolute: bool = False

    def masks(self, sparsity: float) -> Masks:
        """Masks over the targets' weights.

        Raises: `UsageError` for a sparsity outside [0, 1), or one that N:M cannot give.
        """
        prune_count(1, sparsity)
        if isinstance(self.cells, TailShares) and self.rule.ties == "index":
            return self._from_weights(self.cells, sparsity)
        if isinstance(self.granularity, NofM):
            keep = self._n_of_m(sparsity)
        else:
            shares: float | Mapping[str, float] = sparsity
            if self.rule.scope != "global":
                shares = allocate(self.targets, sparsity, self.rule.allocation)
            keep = self._columns(shares) if self.rule.scope == "column" else self._select(self.cells, shares)
        return Masks({t.name: self.granularity.expand(t, keep[t.name]) for t in self.targets})

    def _from_weights(self, cells: TailShares, sparsity: float) -> Masks:
        """Without scores: inside a target they only repeat the order of |w|."""
        if self.rule.scope != "global":
            return replace(self, cells=cells.weights, absolute=True).masks(sparsity)
        return Masks(select_tail_shares(cells, sparsity, rounding=self.rule.rounding, min_keep=self.rule.min_keep))

    def _select(self, cells: Mapping[str, Tensor], shares: float | Mapping[str, float]) -> dict[str, Tensor]:
        return self.rule.select(cells, shares, self.absolute)

    def _columns(self, shares: float | Mapping[str, float]) -> dict[str, Tensor]:
        """One row of cells per unit, however the layer stores its weight."""
        if not isinstance(self.granularity, Weight):
            return self._select(self.cells, shares)
        keep = self._select({t.name: t.rows(self.cells[t.name]) for t in self.targets}, shares)
        return {t.name: t.unrows(keep[t.name]).contiguous() for t in self.targets}

    def _n_of_m(self, sparsity: float) -> dict[str, Tensor]:
        assert isinstance(self.granularity, NofM)
        if abs(sparsity - self.granularity.sparsity) > 1e-9:
            raise UsageError(
                f"granularity {self.granularity} always removes {self.granularity.sparsity:g} of the weights, "
                f"got sparsity {sparsity:g}; ask for that, or use granularity weight"
            )
        return select(self.cells, sparsity, scope="column", rounding="nearest", absolute=self.absolute)


def rank(
    model: nn.Module,
    criterion: Criterion,
    *,
    granularity: str | Granularity = "weight",
    rule: SelectionRule | None = None,
    targets: Targets | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    learned: Mapping[str, Tensor] | None = None,
) -> Ranking:
    """Score the targets of `model` once.

    Args:
        criterion: what to rank by.
        granularity: what is removed together.
        rule: scope, allocation, rounding, ties.
        targets: default: every prunable weight.
        batches, loss, learned: data and learned scores for criteria that need them, see `score_targets`.
    """
    expect_criterion("rank", criterion)
    rule = rule or SelectionRule()
    shape = parse_granularity(granularity)
    if isinstance(shape, NofM) and (rule.scope != "tensor" or rule.allocation != "uniform"):
        raise UsageError(
            f"granularity {shape} takes scope tensor and allocation uniform, got {rule.scope}, {rule.allocation}"
        )
    chosen = find_targets(model) if targets is None else targets

    def score() -> dict[str, Tensor]:
        (scores,) = score_targets(
            model, chosen, [criterion], batches=batches, loss=loss, learned=learned, seed=rule.seed
        )
        return cell_scores(criterion, shape, chosen, scores)

    cells: Mapping[str, Tensor]
    if criterion.tail_share and isinstance(shape, Weight | NofM):
        weights = {name: parameter.detach() for name, parameter in chosen.tensors(model).items()}
        cells = TailShares(cell_scores(criterion, shape, chosen, weights), score)
    else:
        cells = score()
    return Ranking(targets=chosen, cells=cells, granularity=shape, rule=rule, absolute=criterion.absolute)


@dataclass(frozen=True)
class UnitRanking:
    """Scored units of dependency groups: what is chosen can be cut, whole and exactly.

    Args:
        groups: the groups units are chosen from.
        scores: per group `[units]`, the mean over the layers that make the unit.
    """

    groups: Groups
    scores: Mapping[str, Tensor]
    rule: SelectionRule
    model: nn.Module = field(repr=False)

    def kept(self, sparsity: float | Mapping[str, float]) -> dict[str, Tensor]:
        """Per group a bool tensor `[units]`, True = kept; exact counts, equal in every block of a group.

        Args:
            sparsity: fraction to remove, in [0, 1); or one for each group (not with scope `"global"`).
        """
        orders = {g.name: _block_order(self.scores[g.name], g) for g in self.groups}
        cells = {
            g.name: self.scores[g.name].reshape(g.blocks, -1).gather(1, orders[g.name]).mean(0) for g in self.groups
        }
        keep = self.rule.select(cells, sparsity, absolute=False)
        return {
            g.name: torch.zeros(g.blocks, g.units // g.blocks, dtype=torch.bool)
            .scatter_(1, orders[g.name], keep[g.name].cpu().expand(g.blocks, -1))
            .reshape(-1)
            for g in self.groups
        }

    def masks(self, sparsity: float | Mapping[str, float]) -> Masks:
        """The masked self: masks of everything that a cut of `kept(sparsity)` removes."""
        return Masks(unit_masks(self.groups, self.kept(sparsity), self.model))


def _block_order(scores: Tensor, group: Group) -> Tensor:
    """Order of the units inside each block; blocks of one keep their order, so that ties break by index."""
    per_block = scores.reshape(group.blocks, -1)
    if group.blocks == 1:
        return torch.arange(group.units)[None]
    return per_block.argsort(dim=1, stable=True)


def rank_units(
    model: nn.Module,
    criterion: Criterion,
    groups: Groups,
    *,
    rule: SelectionRule | None = None,
    targets: Targets | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
    learned: Mapping[str, Tensor] | None = None,
) -> UnitRanking:
    """Score the units of every group in `groups` that may be cut and whose layers are all in `targets`."""
    expect_criterion("rank_units", criterion)
    rule = rule or SelectionRule()
    if rule.allocation != "uniform":
        raise UsageError("units of dependency groups take allocation uniform (or scope global)")
    chosen = find_targets(model) if targets is None else targets
    names = {alias for t in chosen for alias in (t.name, *t.aliases)}
    usable = Groups([g for g in groups.prunable() if all(p in names for p in g.producers)], groups.untraced)
    if not usable:
        blocked = [f"{g.name} ({g.blocked})" for g in groups if g.blocked]
        raise NoEffectError(
            "no unit may be removed: every group is blocked or excluded"
            + (f"; blocked: {', '.join(blocked[:3])}" if blocked else "")
        )
    producers = Targets([t for t in chosen if any(n in g.producers for g in usable for n in (t.name, *t.aliases))])
    (scores,) = score_targets(
        model, producers, [criterion], batches=batches, loss=loss, learned=learned, seed=rule.seed
    )
    cells = cell_scores(criterion, Unit(), producers, scores)
    by_unit = {
        t.name: (c.abs() if criterion.absolute else c).detach().cpu().double()
        for t, c in ((t, cells[t.name]) for t in producers)
    }
    return UnitRanking(
        groups=usable,
        scores={g.name: _group_score(g, by_unit, producers) for g in usable},
        rule=rule,
        model=model,
    )


def _group_score(group: Group, by_unit: Mapping[str, Tensor], producers: Targets) -> Tensor:
    parts = []
    for member in group.members:
        if member.path in group.producers:
            index = torch.as_tensor(member.index)
            parts.append(by_unit[producers[member.path].name][index].mean(1))
    return torch.stack(parts).mean(0)
