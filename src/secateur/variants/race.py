"""Finding the best of many without trying all of them on everything: those that cannot win any more are left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from secateur.errors import UsageError
from secateur.variants.rungs import Arm, Rung, Table, Values, check_options, distinct, schedule, spread, standard_bound

__all__ = ["Arm", "RaceResult", "Rung", "race"]


@dataclass(frozen=True)
class RaceResult:
    """The winners, and what it took to find them.

    Args:
        winners: indices of the best arms, best first; these and all other survivors saw everything.
        values: arm index -> value over all examples and variants, of every survivor.
        rungs: how many arms were left at each rung.
        evaluated: values computed (variant times example).
        full: how many a full evaluation computes.
    """

    winners: tuple[int, ...]
    values: dict[int, float]
    rungs: tuple[Rung, ...]
    evaluated: int
    full: int


def race(
    arms: Sequence[Arm],
    values: Values,
    examples: int,
    *,
    final: Values | None = None,
    top: int = 1,
    error: float = 0.01,
    first: int = 50,
    growth: float = 2.0,
    replicas: int = 3,
) -> RaceResult:
    """The `top` arms by their mean over all examples and variants.

    All arms are tried on the first examples; an arm is left out once it lies behind the `top`-th best by more than
    chance explains, and the rest go on to more examples and more of their variants, at last to all. Both differences
    between examples (paired) and between an arm's variants count as chance, each as drawn without replacement.

    Args:
        arms: what competes.
        values: `(variant, start, stop)` -> the values of a variant on examples start to stop, one an example, that span
            at most 1 (right or wrong, a probability); scale others. The order of examples must be random: the first
            ones stand for all.
        examples: how many there are.
        final: the same in full precision, if `values` are approximate. The survivors are then judged by it, on
            everything, at the last rung. How far `values` are off is not counted in `error`.
        top: how many winners are asked for, at least 1.
        error: chance, at most, that any of the true winners is left out, by the normal approximation; shared out over
            the pairs of a winner and another arm, and the rungs.
        first, growth: examples at the first rung, and the factor from rung to rung.
        replicas: variants of each arm at the first rung; the number grows alongside.

    Randomness: none of its own.
    """
    if not arms or not 1 <= top <= len(arms):
        raise UsageError(f"race: top lies between 1 and the number of arms, got {top} of {len(arms)}")
    check_options(error, first, growth, replicas, examples)
    table, alive, rungs = Table(values), list(range(len(arms))), []
    most = max(len(a.variants) for a in arms)
    *early, _ = schedule((first, replicas), (examples, most), growth)
    bound = standard_bound(error, top * (len(arms) - top) * len(early))
    for n, m in early:
        seen = {i: table.of(arms[i], m, n) for i in alive}
        rungs.append(Rung(n, m, len(alive)))
        alive = _survivors(arms, seen, top, bound, examples)
        if len(alive) <= top:
            break
    rungs.append(Rung(examples, most, len(alive)))
    judge = table if final is None else Table(final)
    finals = {i: float(judge.of(arms[i], most, examples).mean()) for i in alive}
    ranked = sorted(finals, key=lambda i: (-finals[i], i))
    evaluated = table.evaluated + (judge.evaluated if judge is not table else 0)
    return RaceResult(tuple(ranked[:top]), finals, tuple(rungs), evaluated, distinct(arms) * examples)


def _survivors(arms: Sequence[Arm], seen: dict[int, np.ndarray], top: int, bound: float, examples: int) -> list[int]:
    means = {i: float(rows.mean()) for i, rows in seen.items()}
    ranked = sorted(means, key=lambda i: (-means[i], i))
    chance = spread(arms, seen)
    last = ranked[top - 1]
    reference = seen[last].mean(axis=0)
    left = 1.0 - len(reference) / examples
    kept = set(ranked[:top])
    for i in ranked[top:]:
        difference = reference - seen[i].mean(axis=0)
        n = len(difference)
        # One more example, as far off as any can be: no spread in a few examples is not certainty.
        range_ = max(arms[i].factor, arms[last].factor)
        variance = (float(difference.var(ddof=1)) + range_**2 / n) / n * left
        behind = means[last] - means[i]
        if behind <= bound * math.sqrt(variance + chance[i] + chance[last]):
            kept.add(i)
    return [i for i in seen if i in kept]
