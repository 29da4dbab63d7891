"""Schedules: where they start, where they end, and that they rise."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.schedule import RAMPS, Gradual, Iterative, OneShot, keep_prob_at, targeted_dropout_ramp
from secateur.errors import UnknownNameError, UsageError

sparsities = st.floats(0, 0.999)


@given(sparsities, st.floats(0.01, 0.9))
@settings(max_examples=100, deadline=None)
def test_iterative_ends_exactly_and_never_falls(sparsity, fraction):
    levels = Iterative(sparsity, fraction).levels()
    assert levels[-1] == sparsity
    assert all(0 <= a < b for a, b in itertools.pairwise(levels)) or len(levels) == 1
    for i, level in enumerate(levels[:-1], start=1):
        assert level == pytest.approx(1 - (1 - fraction) ** i)


@given(sparsities, st.integers(1, 30), st.sampled_from(sorted(RAMPS)))
@settings(max_examples=100, deadline=None)
def test_gradual_ends_exactly_and_never_falls(sparsity, steps, ramp):
    levels = Gradual(sparsity, steps, ramp).levels()
    assert len(levels) == steps
    assert levels[-1] == sparsity
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(levels))


def test_gradual_cubic_is_zhu_and_gupta():
    levels = Gradual(0.9, steps=5, ramp="cubic", initial=0.2).levels()
    assert levels == pytest.approx([0.9 + (0.2 - 0.9) * (1 - i / 5) ** 3 for i in range(1, 6)])


@pytest.mark.parametrize("ramp", sorted(RAMPS))
def test_ramps_run_from_zero_to_one_and_rise(ramp):
    values = [RAMPS[ramp](i / 50) for i in range(51)]
    assert values[0] == pytest.approx(0)
    assert values[-1] == pytest.approx(1)
    assert values == sorted(values)


def test_one_shot():
    assert OneShot(0.7).levels() == (0.7,)


@given(st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_the_targeted_dropout_ramp_stays_in_range_and_rises(t):
    gamma, alpha = targeted_dropout_ramp(t)
    later_gamma, later_alpha = targeted_dropout_ramp(min(1.0, t + 0.01))
    assert 0 <= gamma <= 1
    assert 0 <= alpha <= 1
    assert later_gamma >= gamma - 1e-12
    assert later_alpha >= alpha


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["constant", "linear", "cosine"]))
@settings(max_examples=100, deadline=None)
def test_keep_probabilities_stay_between_their_bound_and_one(p, t, schedule):
    assert p - 1e-12 <= keep_prob_at(p, schedule, t) <= 1 + 1e-12


@pytest.mark.parametrize(
    "make",
    [
        lambda: OneShot(1.0),
        lambda: OneShot(-0.1),
        lambda: Iterative(0.5, 0.0),
        lambda: Iterative(0.5, 1.0),
        lambda: Iterative(float("nan")),
        lambda: Gradual(0.5, steps=0),
        lambda: Gradual(0.5, initial=1.0),
    ],
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(UsageError):
        make()


def test_unknown_ramps_list_the_known():
    with pytest.raises(UnknownNameError, match='"cubik"; nearest: cubic'):
        Gradual(0.5, ramp="cubik")
    with pytest.raises(UnknownNameError, match="keep-probability schedule"):
        keep_prob_at(0.5, "quadratic", 0.5)
