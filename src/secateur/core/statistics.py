"""Intervals and tests for a handful of seeds on one finite test set.

What is asked: if the experiment were repeated with new seeds, on the same test images, where would the mean
lie? Seeds are the replicates, so the spread between seeds is the yardstick, and two methods are compared seed
by seed. A few seeds can agree by luck, to the last image; a spread of zero would then claim certainty. Every
interval that is told the size of the test set is therefore never narrower than what that many images could
show at best (the floor, described at `paired_difference`).

Nothing here touches a global random state, and scipy is imported when first used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from secateur.errors import UsageError

__all__ = [
    "BOOTSTRAP_FROM",
    "Interval",
    "above",
    "holm",
    "mean_interval",
    "paired_difference",
    "paired_examples",
    "wilson",
]

# Measured coverage of nominal 95 % intervals (t / BCa): normal differences n=10 .96/.91, n=20 .95/.93,
# n=40 .95/.94; one collapsed run in ten n=10 .65/.63, n=20 .87/.85, n=40 .91/.96. BCa pays from about 40 on.
BOOTSTRAP_FROM = 40
_RESAMPLES = 4000


@dataclass(frozen=True)
class Interval:
    """A mean, its two-sided interval, and where the interval comes from.

    Args:
        mean: the estimate, in the unit of the values.
        low, high: ends of the interval; None where none can be had (one seed, or no spread and no counts).
        n: number of seeds, or of pairs of seeds.
        method: how it was made, in words.
        p: two-sided p-value against zero, for differences; zero is outside the interval where p < 1 - confidence.
        confidence: nominal coverage.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    method: str
    p: float | None = None
    confidence: float = 0.95

    @property
    def resolved(self) -> bool:
        """True where there is an interval and zero lies outside it."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def negated(self) -> Interval:
        """The same interval for the opposite difference (b minus a)."""
        low = None if self.high is None else -self.high
        high = None if self.low is None else -self.low
        return Interval(-self.mean, low, high, self.n, self.method, self.p, self.confidence)


def wilson(correct: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion: one network, `correct` of `count` test images.

    Returns the two ends, each in [0, 1]; never of zero width, also at 0 or `count` correct.
    Reference: Wilson 1927; Agresti and Coull 1998.

    Examples:
        >>> low, high = wilson(0, 10)
        >>> round(low, 4), round(high, 4)
        (0.0, 0.2775)
    """
    if count < 1 or not 0 <= correct <= count:
        raise UsageError(f"wilson: got {correct} correct of {count}; expected 0 <= correct <= count, count >= 1")
    z = _normal_quantile(confidence)
    share = correct / count
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # At 0 or `count` correct the bound is exact; rounding would leave 1e-17 on the wrong side of it.
    return (0.0 if correct == 0 else center - half), (1.0 if correct == count else center + half)


def mean_interval(values: Sequence[float], count: int | None = None, confidence: float = 0.95) -> Interval:
    """Mean of one accuracy per seed, with its interval over seeds.

    Student's t over the seeds, never narrower than the Wilson interval of all tested images together
    (`count` of them a seed). With one seed there is no spread to measure: the Wilson interval is returned and
    named as such, or none where `count` is not given.

    Args:
        values: accuracies in [0, 1], one a seed.
        count: test images a seed; None drops the floor.
        confidence: nominal coverage, in (0, 1).
    """
    data = _finite(values, "mean_interval")
    mean, n = float(data.mean()), len(data)
    low: float | None = None
    high: float | None = None
    method = "no interval from one seed"
    if n > 1 and (count is not None or data.std() > 0):
        half = _student(n, confidence) * float(data.std(ddof=1)) / math.sqrt(n)
        low, high, method = mean - half, mean + half, "t over seeds"
    elif n > 1:
        method = "no interval: no spread, and no test-set size"
    if count is not None:
        floor = wilson(min(round(mean * n * count), n * count), n * count, confidence)
        if low is None or high is None:
            low, high, method = floor[0], floor[1], "Wilson, one network, test images only"
        elif floor[0] < low or floor[1] > high:
            method = "t over seeds, widened to the test-set floor"
            low, high = min(low, floor[0]), max(high, floor[1])
    if low is not None and high is not None:
        low, high = max(0.0, low), min(1.0, high)
    return Interval(mean, low, high, n, method, None, confidence)


def paired_difference(
    a: Mapping[int, float],
    b: Mapping[int, float],
    confidence: float = 0.95,
    *,
    count: int | None = None,
    method: Literal["auto", "t", "bca"] = "auto",
    seed: int = 0,
) -> Interval:
    """Mean of a - b over the seeds that both have, with an interval for repeating both with new seeds.

    Student's t on the differences; from `BOOTSTRAP_FROM` pairs on the bias-corrected accelerated bootstrap,
    which then copes better with a run that collapses now and then (below, it covers less than it claims:
    measured, see the constant). One pair gives no interval.

    The floor. Suppose that on every seed each image the two networks disagree on favors the same side: no
    data with this mean are more favorable to it. Then n * count paired trials hold K = |mean| * n * count
    disagreements, and Agresti and Min's adjusted interval (half a count added to each of the four cells) has
    standard error sqrt(((K + 1) / N - (K / N)^2) / N) with N = n * count + 2. The interval returned covers
    this one too, and p is the larger of the two. So equal differences on all seeds never give zero width: one
    image of 360 on each of 3 seeds is not resolved, as the sign test would say. Without `count`, differences
    that are all equal give no interval.

    Args:
        a, b: accuracy by seed, in [0, 1] where `count` is given.
        count: test images a seed; None drops the floor.
        method: "auto", or one of the two by name.
        seed: of the bootstrap's own generator.

    Raises:
        UsageError: no seed in common, a value that is not finite, or an unknown method.

    Randomness: the bootstrap draws from `numpy.random.default_rng(seed)`; nothing else is random.
    Reference: Efron and Tibshirani 1993, ch. 14 (BCa); Agresti and Min 2005 (paired proportions).

    Examples:
        >>> paired_difference({0: 0.9, 1: 0.8, 2: 0.7}, {0: 0.7, 1: 0.5, 2: 0.3}).resolved
        True
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise UsageError(f"paired_difference: no seed in common, got {sorted(a)} and {sorted(b)}")
    if method not in ("auto", "t", "bca"):
        raise UsageError(f'paired_difference: got method "{method}", expected auto, t or bca')
    differences = _finite([a[key] for key in seeds], "a") - _finite([b[key] for key in seeds], "b")
    mean, n = float(differences.mean()), len(seeds)
    if n == 1:
        return Interval(mean, None, None, 1, "no interval from one seed", None, confidence)
    # Values such as 0.9 - 0.8 and 0.8 - 0.7 differ in the last bit only.
    flat = float(np.ptp(differences)) < 1e-12
    if flat and count is None:
        return Interval(mean, None, None, n, "no interval: no spread, and no test-set size", None, confidence)
    if flat:
        low, high, p, name = mean, mean, 0.0, "equal differences"
    elif method == "bca" or (method == "auto" and n >= BOOTSTRAP_FROM):
        low, high, p = _bca(differences, confidence, seed)
        name = "BCa bootstrap over paired seeds"
    else:
        error = float(differences.std(ddof=1)) / math.sqrt(n)
        half = _student(n, confidence) * error
        low, high, p, name = mean - half, mean + half, _student_p(mean / error, n), "paired t over seeds"
    if count is not None:
        error = _paired_floor(mean, n * count)
        half = _normal_quantile(confidence) * error
        if mean - half < low or mean + half > high:
            name += ", widened to the test-set floor"
        low, high, p = min(low, mean - half), max(high, mean + half), max(p, _normal_p(mean / error))
        low, high = max(low, -1.0), min(high, 1.0)  # a difference of two shares
    return Interval(mean, low, high, n, name, p, confidence)


def paired_examples(a: NDArray[Any], b: NDArray[Any], confidence: float = 0.95) -> Interval:
    """Mean of a - b over examples that two networks were both tried on.

    For right and wrong (bool): Agresti and Min's adjusted interval, p from the exact sign test on the examples on
    which they disagree. For other values: Student's t, p from the same.

    Args:
        a, b: `[examples]`, of the same examples in the same order.

    Reference: Agresti and Min 2005; McNemar 1947 in its exact form.

    Examples:
        >>> right = np.array([True] * 90 + [False] * 10)
        >>> paired_examples(right, np.roll(right, 5)).resolved
        False
    """
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise UsageError(f"paired_examples: got shapes {a.shape} and {b.shape}, expected [n] twice, n at least 1")
    n = a.size
    if a.dtype == bool and b.dtype == bool:
        from scipy.stats import binomtest

        ahead, behind = int((a & ~b).sum()), int((b & ~a).sum())
        # Half a count is added to each of the four cells.
        total, up, down = n + 2, ahead + 0.5, behind + 0.5
        center = (up - down) / total
        error = math.sqrt(max(up + down - (up - down) ** 2 / total, 0.0)) / total
        half = _normal_quantile(confidence) * error
        p = float(binomtest(ahead, ahead + behind).pvalue) if ahead + behind else 1.0
        low, high = max(-1.0, center - half), min(1.0, center + half)
        return Interval((ahead - behind) / n, low, high, n, "Agresti-Min, exact sign test", p, confidence)
    differences = _finite(np.asarray(a, np.float64) - np.asarray(b, np.float64), "paired_examples")  # type: ignore[arg-type]
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    if not error > 0:
        return Interval(mean, None, None, n, "no interval: no spread", None, confidence)
    half = _student(n, confidence) * error
    return Interval(
        mean, mean - half, mean + half, n, "paired t over examples", _student_p(mean / error, n), confidence
    )


def above(values: Sequence[float], constant: float) -> tuple[float, str]:
    """One-sided p-value for "these are larger than a constant", and the name of the test.

    Exact Wilcoxon signed-rank test up to 50 differences of which no two are equally large; the exact sign test
    otherwise. Differences of zero say nothing and are left out.

    Args:
        values: one a repetition, for instance accuracies of noisy networks.
        constant: what has no spread, for instance the accuracy of the deterministic network.

    Reference: Wilcoxon 1945; Conover 1999, sections 3.4 and 5.7.

    Examples:
        >>> above([0.8, 0.82, 0.79, 0.85, 0.81], 0.3)
        (0.03125, 'exact Wilcoxon signed-rank test, one-sided')
    """
    differences = _finite(values, "above") - constant
    # Values such as 0.9 - 0.8 and 0.8 - 0.7 differ in the last bit only.
    differences = differences[np.abs(differences) > 1e-12]
    n = len(differences)
    if not n:
        return 1.0, "no test: all values equal the constant"
    sizes = np.sort(np.abs(differences))
    if n <= 50 and bool((np.diff(sizes) > 1e-12).all()):
        from scipy.stats import wilcoxon

        found = wilcoxon(differences, alternative="greater", method="exact")
        return float(found.pvalue), "exact Wilcoxon signed-rank test, one-sided"
    from scipy.stats import binomtest

    found = binomtest(int((differences > 0).sum()), n, alternative="greater")
    return float(found.pvalue), "exact sign test, one-sided"


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given.

    Comparing each with alpha keeps the chance of any false claim in the whole family at or below alpha,
    however the comparisons depend on each other. Reference: Holm 1979.

    Examples:
        >>> holm([0.01, 0.04, 0.03, 0.005])
        [0.03, 0.06, 0.06, 0.02]
    """
    adjusted, running, size = [1.0] * len(p_values), 0.0, len(p_values)
    for rank, index in enumerate(sorted(range(size), key=p_values.__getitem__)):
        running = max(running, min(1.0, (size - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def _finite(values: Sequence[float], what: str) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data) or not bool(np.isfinite(data).all()):
        raise UsageError(f"{what}: got {list(values)!r}, expected at least one value, all finite")
    return data


def _student(n: int, confidence: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, (1 + confidence) / 2))


def _student_p(t: float, n: int) -> float:
    from scipy.special import stdtr

    return float(2 * stdtr(n - 1, -abs(t)))


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise UsageError(f"confidence: got {confidence}, expected a number in (0, 1), such as 0.95")
    from scipy.special import ndtri

    return float(ndtri((1 + confidence) / 2))


def _normal_p(z: float) -> float:
    from scipy.special import ndtr

    return float(2 * ndtr(-abs(z)))


def _paired_floor(mean: float, trials: int) -> float:
    """Standard error of a mean difference when all disagreements favor one side (see `paired_difference`)."""
    total = trials + 2
    disagree = abs(mean) * trials
    return math.sqrt(max((disagree + 1) / total - (disagree / total) ** 2, 0.0) / total)


def _bca(data: NDArray[np.float64], confidence: float, seed: int) -> tuple[float, float, float]:
    """BCa ends for the mean, and the p-value at which an end would touch zero."""
    from scipy.special import ndtr, ndtri

    n, mean = len(data), float(data.mean())
    draws = np.random.default_rng(seed).integers(0, n, (_RESAMPLES, n))
    means = np.sort(data[draws].mean(axis=1))

    def below(value: float) -> float:
        # Ties count half, and no share is exactly 0 or 1: beyond the last resample nothing is known.
        left, right = np.searchsorted(means, value, "left"), np.searchsorted(means, value, "right")
        return float(np.clip((left + right) / 2 / _RESAMPLES, 0.5 / _RESAMPLES, 1 - 0.5 / _RESAMPLES))

    bias = float(ndtri(below(mean)))
    centered = data - mean
    skew = float((centered**3).sum() / (6 * (centered**2).sum() ** 1.5))

    def end(level: float) -> float:
        shifted = bias + float(ndtri(level))
        return float(np.quantile(means, float(ndtr(bias + shifted / (1 - skew * shifted)))))

    tail = (1 - confidence) / 2
    at_zero = float(ndtri(below(0.0))) - bias
    share = float(ndtr(at_zero / (1 + skew * at_zero) - bias))
    return end(tail), end(1 - tail), min(1.0, 2 * min(share, 1 - share))
