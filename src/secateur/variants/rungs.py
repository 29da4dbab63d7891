"""What races share: arms, what is known of them on the first examples, and how far chance may have moved that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from secateur.errors import DataError, UsageError
from secateur.variants.kinds import Variant

__all__ = ["Arm", "Rung", "Table", "Values", "check_options", "distinct", "schedule", "spread", "standard_bound"]

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


class Table:
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

    def rows(self, arm: Arm, replicas: int, examples: int) -> np.ndarray:
        """Of the arm's variants, `[replicas, examples]`."""
        return np.stack([self.get(v, examples) for v in arm.variants[:replicas]]).astype(np.float64)

    def of(self, arm: Arm, replicas: int, examples: int) -> np.ndarray:
        """The same, without the baseline and times the factor."""
        rows = self.rows(arm, replicas, examples)
        if arm.baseline is not None:
            rows -= self.get(arm.baseline, examples)
        rows *= arm.factor
        return rows


def check_options(error: float, first: int, growth: float, replicas: int, examples: int) -> None:
    """`UsageError` for options that no race can have."""
    if not 0.0 < error < 1.0 or first < 2 or growth <= 1.0 or replicas < 1 or examples < 1:
        raise UsageError(
            f"race: expected error in (0, 1), first at least 2, growth above 1, replicas and examples at least 1, got "
            f"{error}, {first}, {growth}, {replicas}, {examples}"
        )


def schedule(first: tuple[int, int], last: tuple[int, int], growth: float) -> list[tuple[int, int]]:
    """Examples and replicas of every rung, from `first` (or `last`, where that is less) to `last`."""
    rungs = [(min(first[0], last[0]), min(first[1], last[1]))]
    while rungs[-1] != last:
        n, m = rungs[-1]
        rungs.append((min(last[0], math.ceil(n * growth)), min(last[1], math.ceil(m * growth**0.5))))
    return rungs


def standard_bound(error: float, comparisons: int) -> float:
    """Standard deviations that chance exceeds in any of so many comparisons with at most `error`, if it is normal."""
    from scipy.special import ndtri

    return -float(ndtri(error / max(1, comparisons)))


def distinct(arms: Sequence[Arm]) -> int:
    """How many variants there are, baselines among them."""
    return len({v for a in arms for v in (*a.variants, *([a.baseline] if a.baseline is not None else []))})


def spread(arms: Sequence[Arm], seen: Mapping[int, np.ndarray]) -> dict[int, float]:
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
