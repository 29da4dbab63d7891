"""Races on matrices of right and wrong: the same winners as the full table, within the error rate, for less."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import DataError, UsageError
from secateur.variants import NoisyPrune
from secateur.variants.race import Arm, race


def _task(seed, arms=60, replicas=6, examples=2000, spread=0.03):
    """Accuracies on a hill over the arms; variants of an arm differ; hard examples are hard for all."""
    generator = np.random.default_rng(seed)
    level = 0.9 - 0.6 * np.linspace(0, 1, arms) ** 1.5
    generator.shuffle(level)
    ease = generator.normal(0, 0.25, examples)
    made, table = [], {}
    for i, mean in enumerate(level):
        variants = tuple(NoisyPrune(0.0, i / (arms + 1), seed=r) for r in range(replicas))
        made.append(Arm(variants))
        for variant in variants:
            chance = np.clip(mean + generator.normal(0, spread) + ease, 0, 1)
            table[variant] = generator.random(examples) < chance
    return made, table


def _from(table, calls=None):
    def values(variant, start, stop):
        if calls is not None:
            calls.append((variant, start, stop))
        return table[variant][start:stop]

    return values


def _best(arms, table, top=1):
    means = [arm.factor * np.mean([table[v] for v in arm.variants], dtype=np.float64) for arm in arms]
    return [int(i) for i in np.argsort(-np.array(means), kind="stable")[:top]]


def test_the_winner_is_that_of_the_full_table():
    right = saved = 0
    repeats = 40
    for seed in range(repeats):
        arms, table = _task(seed)
        result = race(arms, _from(table), 2000, error=0.05)
        right += result.winners[0] == _best(arms, table)[0]
        saved += result.full / result.evaluated
        assert result.full == 60 * 6 * 2000
    # The error is spent on close arms at every rung; here there are hardly any.
    assert right >= repeats - 1
    assert saved / repeats > 4


@pytest.mark.parametrize("growth", [2.0, 1.2])
@pytest.mark.parametrize(("replicas", "spread"), [(1, 0.0), (6, 0.03)])
@pytest.mark.parametrize("gap", [0.0, 0.005])
def test_the_error_holds_on_close_arms_over_all_rungs(gap, replicas, spread, growth):
    missed, repeats, error = 0, 200, 0.05
    for seed in range(repeats):
        generator = np.random.default_rng(seed)
        arms = [Arm(tuple(NoisyPrune(0.0, level, seed=r) for r in range(replicas))) for level in (0.0, 0.5)]
        table = {
            variant: generator.random(5000) < 0.7 + gap * i + generator.normal(0, spread)
            for i, arm in enumerate(arms)
            for variant in arm.variants
        }
        result = race(arms, _from(table), 5000, error=error, growth=growth)
        means = [np.mean([table[v] for v in arm.variants]) for arm in arms]
        missed += means[result.winners[0]] < max(means) - 1e-9
    assert missed <= error * repeats


def test_clear_gaps_are_still_settled_early():
    generator = np.random.default_rng(0)
    arms = [Arm((NoisyPrune(0.0, i / 50),)) for i in range(50)]
    table = {arm.variants[0]: generator.random(5000) < 0.9 - 0.01 * i for i, arm in enumerate(arms)}
    result = race(arms, _from(table), 5000, error=0.05)
    assert result.winners[0] == _best(arms, table)[0]
    assert result.full / result.evaluated > 5


def test_the_best_few():
    arms, table = _task(3)
    result = race(arms, _from(table), 2000, top=5, error=0.01)
    assert list(result.winners) == _best(arms, table, 5)
    values = [result.values[i] for i in result.winners]
    assert values == sorted(values, reverse=True)


def test_survivors_saw_everything_and_nothing_is_evaluated_twice():
    arms, table = _task(1, arms=20)
    calls = []
    result = race(arms, _from(table, calls), 2000)
    seen = {}
    for variant, start, stop in calls:
        assert seen.get(variant, 0) == start
        seen[variant] = stop
    assert sum(stop - start for _, start, stop in calls) == result.evaluated
    for i, value in result.values.items():
        assert all(seen[v] == 2000 for v in arms[i].variants)
        assert value == pytest.approx(np.mean([table[v] for v in arms[i].variants]))
    alive = [rung.alive for rung in result.rungs]
    assert alive == sorted(alive, reverse=True)
    assert result.rungs[0].examples == 50
    assert result.rungs[0].replicas == 3


def test_a_baseline_is_subtracted_and_the_factor_multiplies():
    variants = [NoisyPrune(0.1, 0.5, s) for s in range(2)]
    low, high = NoisyPrune(0.0, 0.1), NoisyPrune(0.0, 0.2)
    generator = np.random.default_rng(0)
    table = {v: generator.random(400) < 0.8 for v in variants}
    table |= {low: generator.random(400) < 0.7, high: generator.random(400) < 0.2}
    arms = [Arm((variants[0],), low, 0.9), Arm((variants[1],), high, 0.3)]
    result = race(arms, _from(table), 400, error=1e-9)
    first = 0.9 * (table[variants[0]].mean() - table[low].mean())
    second = 0.3 * (table[variants[1]].mean() - table[high].mean())
    assert result.values[0] == pytest.approx(first)
    assert result.values[1] == pytest.approx(second)
    assert result.winners == ((0,) if first > second else (1,))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 4), st.integers(2, 120), st.integers(1, 3))
def test_any_shape_comes_to_an_end(seed, arms, replicas, examples, top):
    made, table = _task(seed, arms, replicas, examples)
    result = race(made, _from(table), examples, top=min(top, arms), first=10, replicas=2)
    assert len(result.winners) == min(top, arms)
    assert result.evaluated <= result.full
    assert result.rungs[-1].examples == examples


def test_equal_arms_are_all_kept():
    variants = [NoisyPrune(0.0, i / 10) for i in range(5)]
    same = np.random.default_rng(0).random(500) < 0.5
    result = race([Arm((v,)) for v in variants], lambda v, a, b: same[a:b], 500)
    assert result.winners == (0,)
    assert len(result.values) == 5


def test_what_is_refused():
    variant = NoisyPrune(0.0, 0.5)
    with pytest.raises(UsageError, match="without variants"):
        Arm(())
    with pytest.raises(UsageError, match="factor"):
        Arm((variant,), factor=float("nan"))
    with pytest.raises(UsageError, match="got 2 of 1"):
        race([Arm((variant,))], lambda v, a, b: np.zeros(b - a), 10, top=2)
    with pytest.raises(UsageError, match="error in"):
        race([Arm((variant,))], lambda v, a, b: np.zeros(b - a), 10, error=0)
    with pytest.raises(DataError, match="finite"):
        race([Arm((variant,))], lambda v, a, b: np.full(b - a, np.nan), 10)
    with pytest.raises(DataError, match="not 10"):
        race([Arm((variant,))], lambda v, a, b: np.zeros(3), 10)
