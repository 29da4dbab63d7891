"""The greedy oracle: the unit that hurts least is dropped, and again, until enough are gone; nothing is retrained."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur.criteria.gathering.batches import labelled
from secateur.criteria.oracle import Oracle
from secateur.errors import UsageError
from secateur.variants.evaluate import Score, data_mark, evaluate_variants, evaluation_basis
from secateur.variants.inputs import moved
from secateur.variants.journal import Journal
from secateur.variants.kinds import DropUnits
from secateur.variants.outcome import Cost
from secateur.variants.workbench import Workbench

__all__ = ["GreedyOracle", "GreedyStep", "greedy_oracle", "negative_cross_entropy"]

Unit = tuple[str, int]


def negative_cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Minus the cross-entropy of every example, `[examples]`: the highest mean is the lowest loss."""
    return -nn.functional.cross_entropy(outputs, labels, reduction="none")


@dataclass(frozen=True)
class GreedyStep:
    """One removal.

    Args:
        layer, unit: what was dropped: name of the layer's weight, and index from 0.
        score: mean score of the network without it and all before it.
    """

    layer: str
    unit: int
    score: float


@dataclass(frozen=True)
class GreedyOracle:
    """What a greedy search has found.

    Args:
        whole: mean score of the network with all its units.
        steps: the removals, first to last.
        units: layer -> how many units it had, of the layers searched.
        cost: what it took; what was read from a journal costs nothing.
    """

    whole: float
    steps: tuple[GreedyStep, ...]
    units: dict[str, int]
    cost: Cost

    @property
    def order(self) -> tuple[Unit, ...]:
        """(layer, unit), first removed first."""
        return tuple((step.layer, step.unit) for step in self.steps)

    def variant(self, count: int) -> DropUnits:
        """The network without the first `count` of them."""
        if not 0 <= count <= len(self.steps):
            raise UsageError(f"greedy oracle: {len(self.steps)} units were dropped, so there are none of {count}")
        return DropUnits(self.order[:count])

    def criterion(self) -> Oracle:
        """To prune by: `rank_units(model, found.criterion(), groups)` with a rule of scope `"global"` follows it."""
        if not self.steps:
            raise UsageError("greedy oracle: nothing was dropped, so there is no order to prune by")
        return Oracle(self.order)

    def rows(self) -> list[dict[str, Any]]:
        """For a table: one row a removal."""
        return [
            {"dropped": number, "layer": step.layer, "unit": step.unit, "score": step.score}
            for number, step in enumerate(self.steps, start=1)
        ]


def greedy_oracle(
    bench: Workbench,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    until: float | None = None,
    score: Score = negative_cross_entropy,
    layers: Sequence[str] | None = None,
    min_keep: int = 1,
    recalibrate: Sequence[Any] | None = None,
    journal: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GreedyOracle:
    """Drop the one unit without which the mean score is highest, then the next given those gone, and so on.

    Args:
        bench: the trained network; left as it was found.
        batches: `(inputs, labels)`, read once and kept in memory.
        steps: how many units to drop, at most; 0 is the search's beginning.
        until: share of the layers' units that is left at the end, in [0, 1), rounded up. With neither it goes on until
            every layer is at `min_keep`.
        score: `(outputs, labels)` -> one value an example, higher is better; default: minus the cross-entropy.
        layers: names of layers or their weights; default: all targets of the bench. The layer that gives the outputs
            belongs there only if a class may be lost.
        min_keep: units that stay in every layer.
        recalibrate: as for `evaluate_variants`.
        journal: file to write scores to as they come and to continue from, also with more steps.
        progress: called with removals tried so far and in all.

    Equal scores: the earlier layer's, then the lower index. Greedy is not optimal: of two units that stand for each
    other it drops one and must then keep the other, and a pair that could go together is not tried as one.

    Raises: as `evaluate_variants`; `UsageError` for numbers out of range.

    Cost: a pass over the data for every unit that is left, at every step: n (n + 1) / 2 passes to drop all of n units.

    Memory: as `evaluate_variants`.

    Reference: Tan and Motani 2020 (DropNet), the oracle; there activations are masked, here what makes them.
    """
    if steps is not None and until is not None:
        raise UsageError("greedy oracle: steps and until both say when to stop; give one")
    if min_keep < 0:
        raise UsageError(f"greedy oracle: min_keep is at least 0, got {min_keep}")
    chosen = bench.targets.names if layers is None else layers
    targets = [bench.target(name) for name in dict.fromkeys(bench.target(name).name for name in chosen)]
    if not targets:
        raise UsageError("greedy oracle: no layers to search; leave layers out to search all of them")
    units = {t.name: t.units for t in targets}
    count = _count(units, steps, until, min_keep)
    data = list(labelled(batches, task="greedy oracle"))
    device = next(bench.network.parameters()).device
    # Moved once, not at every step.
    given = [(moved(inputs, device), moved(labels, device)) for inputs, labels, _ in data]
    book = None
    if journal is not None:
        basis = {"search": "greedy oracle", "layers": units, "min_keep": min_keep, "data": data_mark(data)}
        book = _Book(journal, {**evaluation_basis(bench, score, recalibrate), **basis})
    left = {name: list(range(number)) for name, number in units.items()}
    tried, every = 0, _tries(units, count, min_keep)
    gone: list[Unit] = []
    found: list[GreedyStep] = []
    cost = Cost()

    def means(layer: str, candidates: list[int]) -> list[float]:
        """The mean score without each of the candidates and all that are gone; layer "": without those alone."""
        nonlocal cost
        known = None if book is None else book.scores.get((len(gone), layer))
        if known is None:
            variants = [DropUnits((*gone, (layer, unit))) for unit in candidates] if layer else [DropUnits(())]
            outcome = evaluate_variants(bench, variants, given, score=score, recalibrate=recalibrate)
            known = outcome.means().tolist()
            cost = Cost(
                cost.examples + outcome.cost.examples,
                cost.recalibration + outcome.cost.recalibration,
                cost.made + outcome.cost.made,
            )
            if book is not None:
                book.write(len(gone), layer, known)
        return known

    (whole,) = means("", [])
    for _ in range(count):
        best: GreedyStep | None = None
        for name, candidates in left.items():
            if len(candidates) <= min_keep:
                continue
            for unit, mean in zip(candidates, means(name, candidates), strict=True):
                if best is None or mean > best.score:
                    best = GreedyStep(name, unit, mean)
            tried += len(candidates)
            if progress is not None:
                progress(tried, max(tried, every))
        assert best is not None
        found.append(best)
        gone.append((best.layer, best.unit))
        left[best.layer].remove(best.unit)
    return GreedyOracle(whole, tuple(found), units, cost)


def _count(units: dict[str, int], steps: int | None, until: float | None, min_keep: int) -> int:
    """How many removals are asked for."""
    most = sum(max(0, number - min_keep) for number in units.values())
    if until is not None:
        if not 0.0 <= until < 1.0:
            raise UsageError(f"greedy oracle: until is the share of units left, in [0, 1), got {until}")
        total = sum(units.values())
        return min(most, total - math.ceil(total * until - 1e-9))
    if steps is None:
        return most
    if not 0 <= steps <= most:
        raise UsageError(
            f"greedy oracle: steps is between 0 and {most}, the units that may go with min_keep {min_keep}, got {steps}"
        )
    return steps


def _tries(units: dict[str, int], count: int, min_keep: int) -> int:
    """Removals tried in all, if no layer is ever at `min_keep`."""
    total = sum(number for number in units.values() if number > min_keep)
    return sum(total - step for step in range(count))


class _Book(Journal):
    """The mean scores of a search: one line a step and layer."""

    def __init__(self, path: str | os.PathLike[str], basis: dict[str, Any]) -> None:
        self.scores: dict[tuple[int, str], list[float]] = {}
        super().__init__(path, basis)

    def _read(self, number: int, line: dict[str, Any]) -> None:
        if number == 1:
            super()._read(number, line)
        else:
            self.scores[int(line["step"]), str(line["layer"])] = [float(mean) for mean in line["means"]]

    def write(self, step: int, layer: str, means: list[float]) -> None:
        self._append({"step": step, "layer": layer, "means": means})
