"""Pruning in many rounds without training in between: score, remove a little, score again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.granularity import Granularity
from secateur.core.masks import Masks
from secateur.core.select import prune_count
from secateur.core.targets import Targets, find_targets
from secateur.criteria.base import Criterion
from secateur.criteria.driver import Loss
from secateur.errors import UsageError
from secateur.sparsify.arguments import expect_criterion, expect_sparsity, expect_targets
from secateur.sparsify.ranking import SelectionRule, rank

__all__ = ["prune_in_rounds"]


def prune_in_rounds(
    model: nn.Module,
    criterion: Criterion,
    sparsity: float,
    rounds: int = 100,
    *,
    granularity: str | Granularity = "weight",
    rule: SelectionRule | None = None,
    targets: Targets | None = None,
    batches: Iterable[Any] | None = None,
    loss: Loss | None = None,
) -> Masks:
    """Masks at `sparsity`, reached in `rounds` steps; each scores the network as masked so far.

    After round t of T the fraction (1 - sparsity)^(t / T) is kept. What is gone stays gone. The model is left as it
    was found: its weights are masked while scored, then put back bit by bit.

    Args:
        sparsity: fraction to remove in the end, in [0, 1).
        rounds: T, at least 1; 1 is `rank(...).masks(sparsity)`.
        granularity, rule, targets, batches, loss: as for `rank`. The batches are read in every round.

    Cost: `rounds` times that of the criterion; a copy of the target weights.

    Reference: Tanaka et al. 2020 (SynFlow), algorithm 1.

    Examples:
        >>> from secateur.criteria.magnitude import Magnitude
        >>> prune_in_rounds(nn.Linear(8, 4), Magnitude(), 0.75, rounds=3).kept
        8
    """
    expect_criterion("prune_in_rounds", criterion)
    expect_targets("prune_in_rounds", targets)
    expect_sparsity("prune_in_rounds", sparsity)
    prune_count(1, sparsity)
    if rounds < 1:
        raise UsageError(f"prune_in_rounds: rounds is at least 1, got {rounds}")
    chosen = find_targets(model) if targets is None else targets
    if batches is not None and iter(batches) is batches:
        batches = list(batches)
    masks: Masks | None = None
    with _borrowed(chosen.tensors(model)):
        for done in range(1, rounds + 1):
            ranking = rank(
                model, criterion, granularity=granularity, rule=rule, targets=chosen, batches=batches, loss=loss
            )
            if masks is not None:
                cells = {n: c.abs() if ranking.absolute else c for n, c in ranking.cells.items()}
                gone = {t.name: ranking.granularity.pool(t, (~masks[t.name]).double(), "sum") > 0 for t in chosen}
                lowered = {n: c.masked_fill(gone[n].to(c.device), -math.inf) for n, c in cells.items()}
                ranking = replace(ranking, cells=lowered, absolute=False)
            # The last one exactly, whatever the powers round to.
            share = sparsity if done == rounds else 1.0 - (1.0 - sparsity) ** (done / rounds)
            masks = ranking.masks(share)
            masks.apply_(model)
    assert masks is not None
    return masks


@contextmanager
def _borrowed(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Weights that may be overwritten inside, and are put back."""
    saved: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
