"""What variants were worth, example by example: every comparison is paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.analysis.spread import Spread, spread
from secateur.core.statistics import Interval, paired_examples
from secateur.errors import UsageError
from secateur.variants.kinds import Variant

__all__ = ["Cost", "Outcome"]


@dataclass(frozen=True)
class Cost:
    """What an evaluation took.

    Args:
        examples: examples passed through variants, all together.
        recalibration: examples passed through variants to renew BatchNorm statistics, not counted in `examples`.
        made: how often a variant's weights were made.
    """

    examples: int = 0
    recalibration: int = 0
    made: int = 0


@dataclass(frozen=True)
class Outcome:
    """One row a variant, one column an example.

    Args:
        variants: in the order asked for.
        values: `[variants, examples]`: bool (right or wrong) or float32.
        cost: what it took; what was read from a journal costs nothing.
    """

    variants: tuple[Variant, ...]
    values: np.ndarray
    cost: Cost

    def means(self) -> np.ndarray:
        """`[variants]`, float64."""
        return self.values.mean(axis=1, dtype=np.float64)

    def of(self, variant: Variant) -> np.ndarray:
        """The values of one variant, `[examples]`."""
        if variant not in self.variants:
            raise UsageError(f"outcome: {variant} was not evaluated; it holds {len(self.variants)} variants")
        row: np.ndarray = self.values[self.variants.index(variant)]
        return row

    def difference(self, a: Variant, b: Variant) -> Interval:
        """Mean of `a` minus mean of `b`, on the same examples, with an interval."""
        return paired_examples(self.of(a), self.of(b))

    def spread(self, variants: Sequence[Variant] | None = None) -> Spread:
        """Of the means of variants that differ in their seed, with an interval over the seeds."""
        chosen = self.variants if variants is None else variants
        shares = self.values.dtype == bool
        count = self.values.shape[1] if shares else None
        return spread([float(self.of(v).mean(dtype=np.float64)) for v in chosen], shares=shares, count=count)

    def rows(self) -> list[dict[str, Any]]:
        """For a table: what each variant is, its mean, and how many examples that is of."""
        means, count = self.means(), self.values.shape[1]
        return [
            {**variant.record(), "mean": float(mean), "count": count}
            for variant, mean in zip(self.variants, means, strict=True)
        ]
