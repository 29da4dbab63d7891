"""Finding the best of many without trying all of them on everything: those that cannot win any more are left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.errors import DataError, UsageError
from secateur.variants.kinds import Variant

__all__ = ["Arm", "RaceResult", "Rung", "race"]

Values = Callable[[Variant, int, int], np.ndarray]

# Degrees of freedom that the spread of all arms' replicas counts for beside an arm's own.
_PRIOR = 2.0


@dataclass(frozen=True)
class Arm:
    """What is compared: the mean of some variants, over the examples, times a factor.

    Args:
        variants: at least one; several are repetitions with other seeds, of which the mean counts.
        baseline: a variant whose values are subtracted, example by example.
        factor: positive; what the difference is multiplied by.

    An arm of stochastic pruning's second objective has the noisy variants of one (sigma, sparsity), the deterministic
    network of that sparsity as baseline, and the sparsity as factor.
    """

    variants: tuple[Variant, ...]
    baseline: Variant | None = None
    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.variants:
            raise UsageError("race: an arm without variants; expected at least one")
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise UsageError(f"race: factor of an arm is positive, got {self.factor}")


@dataclass(frozen=True)
class Rung:
    """How far a race has come: `examples` and `replicas` seen of each of `alive` arms."""

    examples: int
    replicas: int
    alive: int


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


class _Table:
    """What is known of each variant: its values on the first examples."""

    def __init__(self, values: Values) -> None:
        self._values = values
        self._known: dict[Variant, np.ndarray] = {}
        self.evaluated = 0

    def get(self, variant: Variant, examples: int) -> np.ndarray:
        known = self._known.get(variant, np.empty(0, np.float32))
        if known.size < examples:
            new = np.asarray(self._values(variant, known.size, examples), np.float32)
            if new.shape != (examples - known.size,) or not np.isfinite(new).all():
                raise DataError(f"race: values of {variant} are not {examples - known.size} finite numbers")
            self.evaluated += new.size
            known = self._known[variant] = np.concatenate([known, new])
        return known[:examples]

    def of(self, arm: Arm, replicas: int, examples: int) -> np.ndarray:
        """`[replicas, examples]`."""
        rows = np.stack([self.get(v, examples) for v in arm.variants[:replicas]]).astype(np.float64)
        if arm.baseline is not None:
            rows -= self.get(arm.baseline, examples)
        rows *= arm.factor
        return rows


def race(
    arms: Sequence[Arm],
    values: Values,
    examples: int,
    *,
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
        values: `(variant, start, stop)` -> the values of a variant on examples start to stop, one an example. The
            order of examples must be random: the first ones stand for all.
        examples: how many there are.
        top: how many winners are asked for, at least 1.
        error: chance, at most, of leaving out a true winner, by the normal approximation; shared out over the arms.
        first, growth: examples at the first rung, and the factor from rung to rung.
        replicas: variants of each arm at the first rung; the number grows alongside.

    Randomness: none of its own.
    """
    if not arms or not 1 <= top <= len(arms):
        raise UsageError(f"race: top lies between 1 and the number of arms, got {top} of {len(arms)}")
    if not 0.0 < error < 1.0 or first < 2 or growth <= 1.0 or replicas < 1 or examples < 1:
        raise UsageError(
            f"race: expected error in (0, 1), first at least 2, growth above 1, replicas and examples at least 1, got "
            f"{error}, {first}, {growth}, {replicas}, {examples}"
        )
    from scipy.special import ndtri

    bound = float(ndtri(1.0 - error / max(1, len(arms) - top)))
    table, alive, rungs = _Table(values), list(range(len(arms))), []
    most = max(len(a.variants) for a in arms)
    n, m = min(first, examples), min(replicas, most)
    while True:
        seen = {i: table.of(arms[i], m, n) for i in alive}
        rungs.append(Rung(n, m, len(alive)))
        if (n, m) == (examples, most):
            break
        alive = _survivors(arms, seen, top, bound, examples)
        if len(alive) <= top:
            n, m = examples, most
        else:
            n, m = min(examples, math.ceil(n * growth)), min(most, math.ceil(m * growth**0.5))
    finals = {i: float(rows.mean()) for i, rows in seen.items()}
    ranked = sorted(finals, key=lambda i: (-finals[i], i))
    distinct = {v for a in arms for v in (*a.variants, *([a.baseline] if a.baseline is not None else []))}
    return RaceResult(tuple(ranked[:top]), finals, tuple(rungs), table.evaluated, len(distinct) * examples)


def _survivors(arms: Sequence[Arm], seen: dict[int, np.ndarray], top: int, bound: float, examples: int) -> list[int]:
    means = {i: float(rows.mean()) for i, rows in seen.items()}
    ranked = sorted(means, key=lambda i: (-means[i], i))
    spread = _spread(arms, seen)
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
        if behind <= bound * math.sqrt(variance + spread[i] + spread[last]):
            kept.add(i)
    return [i for i in seen if i in kept]


def _spread(arms: Sequence[Arm], seen: dict[int, np.ndarray]) -> dict[int, float]:
    """Variance of each arm's mean that comes from having seen only some of its variants."""
    own = {i: float(rows.mean(axis=1).var(ddof=1)) if len(rows) > 1 else math.nan for i, rows in seen.items()}
    known = [v for v in own.values() if not math.isnan(v)]
    pooled = float(np.mean(known)) if known else 0.0
    found = {}
    for i, rows in seen.items():
        m, size = len(rows), len(arms[i].variants)
        mixed = pooled if m < 2 else (_PRIOR * pooled + (m - 1) * own[i]) / (_PRIOR + m - 1)
        found[i] = mixed / m * (1.0 - m / size)
    return found
