"""Rounds of pruning: how many cells the next one removes, from those that remain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from secateur.core.granularity import Weight
from secateur.core.masks import Masks
from secateur.errors import UsageError
from secateur.sparsify.ranking import Ranking, UnitRanking

__all__ = ["next_masks", "next_units", "share_after_round"]


def share_after_round(
    left: Mapping[str, int],
    total: Mapping[str, int],
    fraction: float | Mapping[str, float],
    scope: str,
    min_keep: int = 1,
    round_up: bool = False,
) -> float | dict[str, float]:
    """Fraction removed of everything after a round that removes `fraction` of the n cells left, and at least one.

    Args:
        left, total: cells left, and cells at the start, of every tensor or group.
        fraction: share of what remains that the round removes, in (0, 1); or one for each tensor (scope `"tensor"`).
        scope: `"global"` counts all cells together, `"tensor"` those of each tensor.
        min_keep: no tensor goes below this.
        round_up: remove ceil(fraction n) (lottery tickets' code) instead of floor(fraction n) (DropNet's).

    Returns: one number for `"global"`, otherwise one for each tensor.

    Reference: Tan and Motani 2020 (DropNet), algorithm 1.

    Examples:
        >>> share_after_round({"a": 64, "b": 128}, {"a": 64, "b": 128}, 0.2, "tensor")
        {'a': 0.1875, 'b': 0.1953125}
    """
    if scope == "column":
        raise UsageError('rounds count over tensors or over all of them: use scope "tensor" or "global"')

    def removed(cells: int, floor: int, share: float) -> int:
        exact = share * cells
        asked = math.ceil(exact - 1e-9) if round_up else math.floor(exact + 1e-9)
        return min(max(1, asked), max(0, cells - floor))

    if scope == "global":
        if isinstance(fraction, Mapping):
            raise UsageError('scope "global" takes one fraction for all tensors; a fraction each goes with "tensor"')
        cells, everything = sum(left.values()), sum(total.values())
        return (everything - cells + removed(cells, min_keep * len(left), fraction)) / everything
    shares = fraction if isinstance(fraction, Mapping) else dict.fromkeys(left, fraction)
    return {n: (total[n] - left[n] + removed(left[n], min_keep, shares[n])) / total[n] for n in left}


def next_masks(
    ranking: Ranking, masks: Masks | None, fraction: float | Mapping[str, float], round_up: bool = False
) -> Masks:
    """Masks after one more round, by the scores of `ranking`; what `masks` has removed stays removed.

    Args:
        fraction, round_up: as for `share_after_round`.
    """
    if not isinstance(ranking.granularity, Weight):
        raise UsageError(f"rounds by weight need granularity weight, got {ranking.granularity}")
    cells = {n: c.abs() if ranking.absolute else c for n, c in ranking.cells.items()}
    kept = dict(masks) if masks is not None else {n: torch.ones_like(c, dtype=torch.bool) for n, c in cells.items()}
    lowered = _below(cells, kept)
    share = share_after_round(
        {n: int(k.sum()) for n, k in kept.items()},
        {n: k.numel() for n, k in kept.items()},
        fraction,
        ranking.rule.scope,
        ranking.rule.min_keep,
        round_up,
    )
    chosen = ranking.rule.select(lowered, share, absolute=False)
    return Masks(chosen)


def next_units(
    ranking: UnitRanking, kept: Mapping[str, Tensor] | None, fraction: float, round_up: bool = False
) -> dict[str, Tensor]:
    """Kept units of every group after one more round; what is gone in `kept` stays gone."""
    every = {g.name: torch.ones(g.units, dtype=torch.bool) for g in ranking.groups}
    present = every if kept is None else {name: kept[name] for name in every}
    lowered = replace(ranking, scores=_below(ranking.scores, present))
    share = share_after_round(
        {g.name: int(present[g.name].sum()) // g.blocks for g in ranking.groups},
        {g.name: g.units // g.blocks for g in ranking.groups},
        fraction,
        ranking.rule.scope,
        ranking.rule.min_keep,
        round_up,
    )
    return lowered.kept(share)


def _below(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scores, with what is gone below everything that is left."""
    return {n: s.masked_fill(~kept[n].to(s.device), -math.inf) for n, s in scores.items()}
