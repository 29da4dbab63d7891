"""How much a number changes from seed to seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from secateur.core.statistics import Interval, mean_interval, paired_difference
from secateur.errors import UsageError

__all__ = ["Spread", "spread"]


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Args:
        mean, low, high: mean, smallest and largest.
        deviation: standard deviation, n - 1 below; None for one value.
        interval: for the mean, if the experiment were repeated with new seeds.
    """

    mean: float
    deviation: float | None
    low: float
    high: float
    interval: Interval


def spread(values: Sequence[float], *, shares: bool = True, count: int | None = None) -> Spread:
    """Mean, standard deviation, smallest and largest of one number a seed, and an interval for the mean.

    Args:
        values: one a seed, at least one.
        shares: they are accuracies or other shares in [0, 1], and the interval is kept there; False for other numbers,
            which have Student's t.
        count: images that each share is of; the interval is then never narrower than what so many can show.

    Raises: `UsageError` for values that are not finite, or that are no shares.

    Examples:
        >>> found = spread([0.8, 0.9, 0.7])
        >>> round(found.mean, 3), round(found.deviation, 3), found.low, found.high
        (0.8, 0.1, 0.7, 0.9)
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not data.size or not bool(np.isfinite(data).all()):
        raise UsageError(f"spread: got {list(values)}, expected at least one number, all finite")
    if shares and (data.min() < 0 or data.max() > 1):
        raise UsageError(f"spread: got values from {data.min()} to {data.max()}; for others than shares: shares=False")
    if not shares and count is not None:
        raise UsageError("spread: count is for shares of so many images; leave it out, or set shares=True")
    return Spread(
        mean=float(data.mean()),
        deviation=float(data.std(ddof=1)) if data.size > 1 else None,
        low=float(data.min()),
        high=float(data.max()),
        interval=mean_interval(data.tolist(), count) if shares else _unbounded(data.tolist()),
    )


def _unbounded(values: Sequence[float]) -> Interval:
    found = paired_difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0), method="t")
    method = "t over seeds" if found.low is not None else found.method.removesuffix(", and no test-set size")
    return replace(found, method=method, p=None)
