"""Durations and progress."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.duration import Duration, Progress
from secateur.errors import UsageError


@pytest.mark.parametrize(
    ("text", "steps"), [("30ep", 300), ("1.5ep", 15), ("500it", 500), ("0.4run", 40), (" 2 ep ", 20), (".5run", 50)]
)
def test_steps(text, steps):
    duration = Duration.parse(text)
    assert duration.steps(steps_per_epoch=10, run_steps=100) == steps
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize(
    "text", ["30", "30 epochs", "-1ep", "1.5it", "1.1run", "ep", "", "1e400ep", "nanep", "10 it 5 ep", None]
)
def test_what_is_not_a_duration_is_refused(text):
    with pytest.raises(UsageError, match="duration"):
        Duration.parse(text)


def test_a_share_of_a_run_needs_a_run():
    with pytest.raises(UsageError, match="the run has no length"):
        Duration.parse("0.5run").steps(steps_per_epoch=10)


@given(st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_whole_numbers_survive_being_written(n):
    for unit in ("ep", "it"):
        duration = Duration.parse(f"{n}{unit}")
        assert Duration.parse(str(duration)) == duration


@given(st.integers(0, 300), st.integers(1, 300), st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_progress(step, steps, per_epoch):
    progress = Progress(step, steps, per_epoch)
    assert 0 <= progress.epoch_fraction <= progress.fraction <= 1
    assert progress.epoch == step // per_epoch
    assert Progress(steps, steps, per_epoch).fraction == 1.0


def test_epoch_fraction_moves_once_an_epoch():
    fractions = [Progress(s, 20, 5).epoch_fraction for s in range(21)]
    assert fractions == [0.0] * 5 + [0.25] * 5 + [0.5] * 5 + [0.75] * 5 + [1.0]
