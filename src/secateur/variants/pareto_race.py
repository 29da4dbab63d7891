"""Finding the Pareto front of many without trying all of them on everything: the dominated are left out early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.errors import UsageError
from secateur.variants.rungs import Arm, Rung, Table, Values, check_options, distinct, schedule, spread, standard_bound

__all__ = ["FrontArm", "FrontResult", "pareto_race"]

Matrix = NDArray[np.float64]

# Below this a difference may be rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class FrontArm(Arm):
    """What is compared: its objectives, higher is better in each.

    The value is the mean of some variants over the examples. With a baseline there is the gain besides: the factor
    times what the value lies above the baseline's.

    Args:
        variants: at least one; several are repetitions with other seeds, of which the mean counts.
        baseline: a variant whose values the gain is over.
        factor: positive; multiplies the gain alone, so it is 1 without a baseline.
        known: exact objectives that nothing need be evaluated for, finite, such as the sparsity.
    """

    known: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline is None and self.factor != 1.0:
            raise UsageError(f"pareto_race: factor multiplies the gain over a baseline; got {self.factor} without one")
        if not all(math.isfinite(number) for number in self.known):
            raise UsageError(f"pareto_race: known objectives are finite numbers, got {self.known}")


@dataclass(frozen=True)
class FrontResult:
    """The front, and what it took to find it.

    Args:
        front: indices of the arms that no other dominates, in their order; equal arms are all in it.
        values: arm index -> its objectives over all examples and variants: value, gain (with a baseline), known ones;
            of every survivor.
        rungs: how many arms were left at each rung.
        evaluated: values computed (variant times example).
        full: how many a full evaluation computes.
    """

    front: tuple[int, ...]
    values: dict[int, tuple[float, ...]]
    rungs: tuple[Rung, ...]
    evaluated: int
    full: int


def pareto_race(
    arms: Sequence[FrontArm],
    values: Values,
    examples: int,
    *,
    final: Values | None = None,
    whole_losses: bool = False,
    error: float = 0.01,
    first: int = 50,
    growth: float = 2.0,
    replicas: int = 3,
) -> FrontResult:
    """The arms that no other dominates on all examples and variants: nowhere worse, somewhere better.

    All arms are tried on the first examples. An arm is left out once some other arm is ahead of it in every measured
    objective by more than chance explains, and not behind it in a known one. The rest go on to more examples and more
    of their variants, at last to all: the front is that of complete numbers. So an arm that is sure to be on the front
    goes on too, for its numbers and to be compared with, and the front's share of the arms is the least to be paid.
    Both differences between examples (paired) and between an arm's variants count as chance, each as drawn without
    replacement.

    Args:
        arms: what competes; all with a baseline or none, and with as many known objectives.
        values: `(variant, start, stop)` -> the values of a variant on examples start to stop, one an example, between
            0 and 1 or near that. The order of examples must be random: the first ones stand for all.
        examples: how many there are.
        final: the same in full precision, if `values` are approximate. The survivors are then judged by it, on
            everything, at the last rung. How far `values` are off is not counted in `error`.
        whole_losses: a gain below 0 is not multiplied by the factor, as `secateur.search.accuracy_and_gain` has it;
            factors are then at most 1.
        error: chance, at most, that an arm of the front is left out, by the normal approximation; shared out over the
            pairs of arms and the rungs.
        first, growth: examples at the first rung, and the factor from rung to rung.
        replicas: variants of each arm at the first rung; the number grows alongside.

    Randomness: none of its own.

    Cost: besides the values, O(arms squared times examples) at a rung.
    """
    check_options(error, first, growth, replicas, examples)
    _check_arms(arms, whole_losses)
    most = max(len(a.variants) for a in arms)
    last = (examples, most)
    *early, _ = schedule((first, replicas), last, growth)
    table, alive, rungs = Table(values), list(range(len(arms))), []
    bound = standard_bound(error, len(arms) * (len(arms) - 1) * len(early))
    for n, m in early:
        rungs.append(Rung(n, m, len(alive)))
        alive = _survivors(arms, alive, table, (n, m), examples, bound, whole_losses)
        if len(alive) == 1:
            break
    judge = table if final is None else Table(final)
    found = {i: _objectives(arms[i], judge, last, whole_losses) for i in alive}
    rungs.append(Rung(examples, most, len(alive)))
    points = np.array(list(found.values()))
    front = tuple(i for i, point in found.items() if not _dominates(points, np.array(point)).any())
    evaluated = table.evaluated + (judge.evaluated if judge is not table else 0)
    return FrontResult(front, found, tuple(rungs), evaluated, distinct(arms) * examples)


def _check_arms(arms: Sequence[FrontArm], whole_losses: bool) -> None:
    if not arms:
        raise UsageError("pareto_race: no arms; expected at least one")
    if len({a.baseline is None for a in arms}) > 1:
        raise UsageError("pareto_race: some arms have a baseline and some do not; give one to all or to none")
    if len({len(a.known) for a in arms}) > 1:
        counts = sorted({len(a.known) for a in arms})
        raise UsageError(f"pareto_race: arms have {counts} known objectives; expected as many in each")
    if whole_losses and max(a.factor for a in arms) > 1.0:
        raise UsageError(
            f"pareto_race: whole_losses needs factors of at most 1, got {max(a.factor for a in arms)}: a loss must not "
            "count less than it is"
        )


def _objectives(arm: FrontArm, table: Table, last: tuple[int, int], whole_losses: bool) -> tuple[float, ...]:
    examples, most = last
    rows = table.rows(arm, most, examples)
    measured = [float(rows.mean())]
    if arm.baseline is not None:
        above = float((rows - table.get(arm.baseline, examples)).mean())
        measured.append(above if whole_losses and above < 0 else arm.factor * above)
    return (*measured, *arm.known)


def _dominates(points: Matrix, point: Matrix) -> NDArray[np.bool_]:
    """Which of `points` are nowhere worse than `point` and somewhere better."""
    found: NDArray[np.bool_] = np.logical_and((points >= point).all(axis=1), (points > point).any(axis=1))
    return found


def _survivors(
    arms: Sequence[FrontArm],
    alive: list[int],
    table: Table,
    rung: tuple[int, int],
    examples: int,
    bound: float,
    whole_losses: bool,
) -> list[int]:
    n, m = rung
    seen = {i: table.rows(arms[i], m, n) for i in alive}
    chance = spread(arms, seen)
    spreads = np.array([chance[i] for i in alive])
    means = np.stack([seen[i].mean(axis=0) for i in alive])
    known = np.array([arms[i].known for i in alive]).reshape(len(alive), 1, -1)
    dominated = (known >= known.swapaxes(0, 1)).all(axis=2)
    left = 1.0 - n / examples
    ones = np.ones(len(alive))
    dominated &= _ahead(_Side(means, ones, spreads), _Side(means, ones, spreads), bound, left)
    if arms[alive[0]].baseline is not None:
        bases = {i: arms[i].baseline for i in alive}
        above = means - np.stack([table.get(b, n) for b in bases.values() if b is not None])
        factors = [np.array([arms[i].factor for i in alive]), *([ones] if whole_losses else [])]
        sides = [_Side(above * f[:, None], f, spreads * f**2) for f in factors]
        # A gain is the smallest of its sides: it is above another if all its sides are above one of the other's.
        over = [np.all([_ahead(a, b, bound, left) for a in sides], axis=0) for b in sides]
        dominated &= np.any(over, axis=0)
    return [i for i, others in zip(alive, dominated.T, strict=True) if not others.any()]


@dataclass(frozen=True)
class _Side:
    """An objective of each arm: on each example, what it can differ by there, and its variance over the variants."""

    rows: Matrix
    scale: Matrix
    spread: Matrix


def _ahead(a: _Side, b: _Side, bound: float, left: float) -> NDArray[np.bool_]:
    """`[arms, arms]`: whether the first arm's `a` is above the second one's `b` by more than chance explains."""
    n = a.rows.shape[1]
    mean_a, mean_b = a.rows.mean(axis=1), b.rows.mean(axis=1)
    away_a, away_b = a.rows - mean_a[:, None], b.rows - mean_b[:, None]
    squares = (away_a**2).sum(axis=1)[:, None] + (away_b**2).sum(axis=1) - 2.0 * away_a @ away_b.T
    # One more example, as far off as any can be: no spread in a few examples is not certainty.
    range_ = np.maximum(a.scale[:, None], b.scale)
    variance = (np.maximum(squares, 0.0) / max(1, n - 1) + range_**2 / n) / n * left
    margin = bound * np.sqrt(variance + a.spread[:, None] + b.spread)
    ahead: NDArray[np.bool_] = mean_a[:, None] - mean_b > margin + _ROUNDING
    return ahead
