"""A recipe's ways of pruning, applied to a network: which criterion ranks it, and its ranking."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

from torch import Tensor, nn

from secateur.core.groups import Groups
from secateur.core.masks import Masks
from secateur.core.targets import find_targets
from secateur.criteria import CRITERIA
from secateur.lab.context import Context
from secateur.lab.models import MODELS
from secateur.lab.plugins import make_criterion, running
from secateur.lab.recipe import PruneSpec
from secateur.sparsify.ranking import Ranking, SelectionRule, UnitRanking, rank, rank_units
from secateur.sparsify.rounds import prune_in_rounds

__all__ = ["masks_in_rounds", "unit_ranking", "weight_ranking"]


def weight_ranking(
    context: Context, model: nn.Module, seed: int, spec: PruneSpec, learned: Mapping[str, Tensor] | None = None
) -> Ranking:
    """The weights of a network, ranked as a prune entry says."""
    with _scoring(context, spec):
        return rank(
            model,
            make_criterion(spec.criterion, context.options.allow_code),
            granularity=spec.granularity,
            rule=_rule(spec, seed),
            targets=find_targets(model, spec.include, spec.exclude),
            batches=context.training_batches(),
            learned=learned,
        )


def masks_in_rounds(
    context: Context, model: nn.Module, seed: int, spec: PruneSpec, sparsity: float, rounds: int
) -> Masks:
    """Masks of a network's weights, scored again in every one of `rounds` steps on the way to a sparsity."""
    with _scoring(context, spec):
        return prune_in_rounds(
            model,
            make_criterion(spec.criterion, context.options.allow_code),
            sparsity,
            rounds,
            granularity=spec.granularity,
            rule=_rule(spec, seed),
            targets=find_targets(model, spec.include, spec.exclude),
            batches=context.training_batches(),
        )


def unit_ranking(
    context: Context, model: nn.Module, seed: int, spec: PruneSpec, learned: Mapping[str, Tensor] | None = None
) -> UnitRanking:
    """The units of a network, ranked as a prune entry says."""
    groups: Groups = context.groups.inner() if spec.groups == "inner" else context.groups.prunable()
    with _scoring(context, spec):
        return rank_units(
            model,
            make_criterion(spec.criterion, context.options.allow_code),
            groups,
            rule=_rule(spec, seed),
            targets=find_targets(model, spec.include, spec.exclude),
            batches=context.training_batches(),
            learned=learned,
        )


def _scoring(context: Context, spec: PruneSpec) -> AbstractContextManager[None]:
    used = (CRITERIA, spec.criterion["name"]), (MODELS, context.recipe.model.name)
    return running("scoring", *used, allow_code=context.options.allow_code)


def _rule(spec: PruneSpec, seed: int) -> SelectionRule:
    return SelectionRule(spec.scope, spec.allocation, spec.rounding, spec.min_keep, ties=spec.ties, seed=seed)
