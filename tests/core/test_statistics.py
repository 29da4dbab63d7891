"""Intervals cover what they claim, never collapse to a point, and Holm agrees with a sum done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.statistics import (
    BOOTSTRAP_FROM,
    Interval,
    above,
    holm,
    mean_interval,
    paired_difference,
    paired_examples,
    wilson,
)
from secateur.errors import UsageError


def by_seed(values: np.ndarray | list[float]) -> dict[int, float]:
    return {index: float(value) for index, value in enumerate(values)}


def test_paired_t_by_hand() -> None:
    # Differences 2, 3, 4: mean 3, s = 1, t(2, .975) = 4.30265; half width 4.30265 / sqrt(3) = 2.48414.
    got = paired_difference({5: 3.0, 6: 5.0, 7: 7.0}, {7: 3.0, 6: 2.0, 5: 1.0})
    assert got.mean == pytest.approx(3)
    assert got.low == pytest.approx(3 - 2.48414, abs=1e-5)
    assert got.high == pytest.approx(3 + 2.48414, abs=1e-5)
    assert got.n == 3
    assert got.resolved


def test_paired_t_agrees_with_scipy() -> None:
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(3)
    a, b = rng.normal(0.5, 1, 7), rng.normal(0, 1, 7)
    got, reference = paired_difference(by_seed(a), by_seed(b)), ttest_rel(a, b)
    assert got.p == pytest.approx(reference.pvalue)
    assert (got.low, got.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))


def test_bca_agrees_with_scipy() -> None:
    from scipy.stats import bootstrap

    data = np.random.default_rng(1).exponential(1.0, BOOTSTRAP_FROM)
    got = paired_difference(by_seed(data), dict.fromkeys(range(len(data)), 0.0))
    assert "BCa" in got.method
    rng = np.random.default_rng(2)
    reference = bootstrap((data,), np.mean, n_resamples=20_000, method="BCa", rng=rng).confidence_interval
    assert (got.low, got.high) == pytest.approx((reference.low, reference.high), abs=0.03)
    again = paired_difference(by_seed(data), dict.fromkeys(range(len(data)), 0.0))
    assert again == got


@given(st.integers(0, 10_000), st.floats(-1.0, 1.0), st.sampled_from(["t", "bca"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_p_below_alpha_exactly_when_zero_is_outside(seed: int, shift: float, method: str, counted: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(shift, 1, 12) / 20, rng.normal(0, 1, 12) / 20
    got = paired_difference(by_seed(a), by_seed(b), count=200 if counted else None, method=method)  # type: ignore[arg-type]
    assert got.p is not None
    if abs(got.p - 0.05) > 0.005:  # bootstrap quantiles interpolate; both ends meet zero within a few resamples
        assert got.resolved == (got.p < 0.05)
    mirrored = paired_difference(by_seed(b), by_seed(a), count=200 if counted else None, method="t")
    if method == "t":
        assert mirrored.negated().low == pytest.approx(got.low)
        assert mirrored.negated().high == pytest.approx(got.high)


def test_only_common_seeds_are_paired() -> None:
    got = paired_difference({0: 0.5, 1: 0.6, 9: 0.0}, {1: 0.4, 0: 0.2, 4: 1.0})
    assert got.n == 2
    assert got.mean == pytest.approx(0.25)
    with pytest.raises(UsageError, match="no seed in common"):
        paired_difference({0: 1.0}, {1: 1.0})


def test_one_seed_has_no_interval() -> None:
    got = paired_difference({0: 0.9}, {0: 0.5}, count=360)
    assert got.low is None
    assert got.p is None
    assert not got.resolved


@pytest.mark.parametrize(
    ("images", "seeds", "resolved"),
    [(0, 3, False), (1, 3, False), (2, 2, False), (2, 3, True), (20, 3, True)],
)
def test_equal_differences_never_claim_certainty(images: int, seeds: int, resolved: bool) -> None:
    a = {seed: (300 + images + seed) / 360 for seed in range(seeds)}
    b = {seed: (300 + seed) / 360 for seed in range(seeds)}
    got = paired_difference(a, b, count=360)
    assert got.low is not None
    assert got.high is not None
    assert got.high - got.low > 1 / 360 / seeds
    assert got.resolved is resolved
    # The exact sign test on the same disagreements agrees about 5 %.
    assert resolved == (images > 0 and 2 * 0.5 ** (images * seeds) < 0.05)
    assert paired_difference(a, b).low is None


def test_floor_only_widens() -> None:
    a, b = {0: 0.80, 1: 0.83, 2: 0.79}, {0: 0.70, 1: 0.71, 2: 0.69}
    free, floored = paired_difference(a, b), paired_difference(a, b, count=50)
    assert free.low is not None
    assert free.high is not None
    assert floored.low is not None
    assert floored.high is not None
    assert floored.low <= free.low
    assert floored.high >= free.high
    assert floored.p is not None
    assert free.p is not None
    assert floored.p >= free.p
    assert paired_difference(a, b, count=10**9).low == pytest.approx(free.low)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_coverage_of_the_paired_interval_when_seeds_are_normal(n: int) -> None:
    rng, hits, rounds = np.random.default_rng(n), 0, 1500
    for _ in range(rounds):
        shared = rng.normal(0, 3, n)  # what pairing removes: without it the interval would be far too wide
        got = paired_difference(by_seed(shared + rng.normal(0.7, 1, n)), by_seed(shared))
        assert got.low is not None
        assert got.high is not None
        hits += got.low <= 0.7 <= got.high
    assert abs(hits / rounds - 0.95) < 4 * (0.95 * 0.05 / rounds) ** 0.5


def test_coverage_of_the_bootstrap_where_it_is_used() -> None:
    rng, hits, rounds = np.random.default_rng(11), 0, 300
    for _ in range(rounds):
        got = paired_difference(by_seed(rng.normal(0.7, 1, 40)), by_seed(np.zeros(40)))
        assert got.low is not None
        assert got.high is not None
        hits += got.low <= 0.7 <= got.high
    assert hits / rounds > 0.90


@pytest.mark.parametrize("count", [40, 360])
def test_coverage_on_counted_images_with_ties(count: int) -> None:
    # Few images: differences tie often, which is where a bare t interval would have no width.
    rng, hits, bare, rounds = np.random.default_rng(count), 0, 0, 1000
    for _ in range(rounds):
        a, b = rng.binomial(count, 0.97, 2) / count, rng.binomial(count, 0.95, 2) / count
        got, plain = (paired_difference(by_seed(a), by_seed(b), count=c) for c in (count, None))
        assert got.low is not None
        assert got.high is not None
        hits += got.low <= 0.02 <= got.high
        bare += plain.low is not None and plain.high is not None and plain.low <= 0.02 <= plain.high
    assert hits / rounds >= 0.93
    assert bare <= hits


@given(st.integers(1, 500), st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_wilson_holds_the_share_and_has_width(count: int, share: float) -> None:
    correct = round(share * count)
    low, high = wilson(correct, count)
    assert 0 <= low <= correct / count <= high <= 1
    assert low < high


def test_wilson_agrees_with_scipy_and_refuses_nonsense() -> None:
    from scipy.stats import binomtest

    for correct, count in [(335, 360), (0, 20), (20, 20), (1, 3)]:
        reference = binomtest(correct, count).proportion_ci(method="wilson")
        assert wilson(correct, count) == pytest.approx((reference.low, reference.high))
    with pytest.raises(UsageError, match="got 4 correct of 3"):
        wilson(4, 3)
    with pytest.raises(UsageError, match="confidence"):
        wilson(1, 3, confidence=95)


def test_mean_interval() -> None:
    got = mean_interval([0.8, 0.9, 1.0])
    assert got.mean == pytest.approx(0.9)
    assert got.low == pytest.approx(0.9 - 4.30265 * 0.1 / 3**0.5, abs=1e-5)
    assert got.high == 1.0  # an accuracy cannot exceed one
    one = mean_interval([0.9], count=100)
    assert (one.low, one.high) == pytest.approx(wilson(90, 100))
    assert "Wilson" in one.method
    flat = mean_interval([0.1, 0.1, 0.1], count=100)
    assert (flat.low, flat.high) == pytest.approx(wilson(30, 300))
    assert mean_interval([0.5]).low is None
    assert mean_interval([0.5, 0.5]).low is None
    with pytest.raises(UsageError, match="finite"):
        mean_interval([0.5, float("nan")])


def test_holm_by_hand() -> None:
    # Sorted: .005 * 4 = .02; .01 * 3 = .03; .03 * 2 = .06; .04 * 1 = .04, raised to .06 to stay in order.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_holm_bounds(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for raw, value in zip(p_values, adjusted, strict=True):
        assert raw <= value <= min(1.0, raw * len(p_values) + 1e-12)  # at most Bonferroni
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [adjusted[i] for i in order] == sorted(adjusted)
    assert adjusted[order[0]] == pytest.approx(min(1.0, p_values[order[0]] * len(p_values)))


def test_holm_keeps_false_claims_rare() -> None:
    rng, rounds = np.random.default_rng(0), 3000
    false = sum(min(holm(list(rng.uniform(size=8)))) < 0.05 for _ in range(rounds))
    assert 0.035 < false / rounds < 0.065


def test_negated_keeps_missing_ends() -> None:
    assert Interval(0.1, None, None, 1, "none").negated().low is None


def test_a_difference_of_shares_stays_within_a_hundred_points() -> None:
    found = paired_difference({0: 0.9, 1: 0.1}, {0: 0.2, 1: 0.8}, count=100)
    assert (found.low, found.high) == (-1.0, 1.0)


def test_paired_examples_by_hand():
    a = np.array([True] * 60 + [False] * 40)
    b = np.array([True] * 50 + [False] * 35 + [True] * 15)
    # 10 examples only the first is right on, 15 only the second.
    found = paired_examples(a, b)
    total, up, down = 102, 10.5, 15.5
    error = math.sqrt(up + down - (up - down) ** 2 / total) / total
    assert found.mean == pytest.approx(-0.05)
    assert found.low == pytest.approx((up - down) / total - 1.959964 * error, abs=1e-6)
    assert found.high == pytest.approx((up - down) / total + 1.959964 * error, abs=1e-6)
    assert found.p == pytest.approx(2 * sum(math.comb(25, k) for k in range(11)) / 2**25)
    assert paired_examples(a, a).p == 1.0
    assert not paired_examples(a, a).resolved
    values = paired_examples(np.array([1.0, 2.0, 4.0]), np.array([0.0, 0.5, 3.0]))
    assert values.mean == pytest.approx(3.5 / 3)
    with pytest.raises(UsageError, match="expected"):
        paired_examples(a, b[:3])


def test_above_a_constant_by_counting_all_signs():
    # Every assignment of signs to the ranks is as likely: the share with a rank sum as large as that found.
    values, constant = [0.5, 0.61, 0.45, 0.72, 0.59], 0.47
    differences = np.array(values) - constant
    ranks = np.abs(differences).argsort().argsort() + 1
    found = sum(r for r, d in zip(ranks, differences, strict=True) if d > 0)
    sums = [sum(r for i, r in enumerate(ranks) if signs >> i & 1) for signs in range(2**5)]
    p, name = above(values, constant)
    assert p == pytest.approx(np.mean([s >= found for s in sums]))
    assert "Wilcoxon" in name
    # Equal sizes: eight of ten above.
    p, name = above([0.6] * 8 + [0.4] * 2, 0.5)
    assert p == pytest.approx(sum(math.comb(10, k) for k in (8, 9, 10)) / 2**10)
    assert "sign test" in name
    assert above([0.5, 0.5], 0.5) == (1.0, "no test: all values equal the constant")
    with pytest.raises(UsageError, match="finite"):
        above([], 0.5)
