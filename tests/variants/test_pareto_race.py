"""Races for the Pareto front: the same front as the full table's, within the error rate, for less."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from secateur.errors import DataError, SecateurError, UsageError
from secateur.search import accuracy_and_gain, front
from secateur.variants import FrontArm, NoisyPrune, Workbench, evaluate_variants, race_front
from secateur.variants.pareto_race import pareto_race

EXAMPLES = 1500


def _task(seed, arms=50, replicas=5, examples=EXAMPLES, gain=False):
    """Accuracy falls with sparsity and noise, which helps a sparse network at first; some examples are hard for all."""
    generator = np.random.default_rng(seed)
    ease = generator.normal(0, 0.25, examples)
    made, table = [], {}
    for _ in range(arms):
        sigma, sparsity = (float(v) for v in generator.uniform(0.02, 0.98, 2))
        plain_level = 0.95 - 0.7 * sparsity**3
        level = plain_level - 0.4 * sigma**2 + (0.5 * sparsity * (1 - sigma) if gain else 0.0)
        variants = tuple(NoisyPrune(sigma, sparsity, seed=r) for r in range(replicas))
        plain = NoisyPrune(0.0, sparsity)
        for variant in (*variants, plain):
            mean = plain_level if variant == plain else level + generator.normal(0, 0.02)
            chance = np.clip(mean + ease, 0, 1)
            table[variant] = generator.random(examples) < chance
        made.append(FrontArm(variants, plain, sparsity) if gain else FrontArm(variants, known=(sparsity,)))
    return made, table


def _from(table, calls=None):
    def values(variant, start, stop):
        if calls is not None:
            calls.append((variant, start, stop))
        return table[variant][start:stop]

    return values


def _points(arms, table, whole_losses=False):
    points = []
    for arm in arms:
        rows = np.stack([table[v] for v in arm.variants]).astype(float)
        point = [rows.mean()]
        if arm.baseline is not None:
            above = (rows - table[arm.baseline]).mean()
            point.append(above if whole_losses and above < 0 else arm.factor * above)
        points.append((*point, *arm.known))
    return points


def _front(arms, table, whole_losses=False):
    points = _points(arms, table, whole_losses)
    return tuple(front(points, ["maximize"] * len(points[0])))


@pytest.mark.parametrize(("gain", "whole"), [(False, False), (True, False), (True, True)])
def test_the_front_is_that_of_the_full_table(gain, whole):
    right = recall = saved = 0
    repeats = 30
    for seed in range(repeats):
        arms, table = _task(seed, gain=gain)
        result = pareto_race(arms, _from(table), EXAMPLES, error=0.05, whole_losses=whole)
        expected = _front(arms, table, whole)
        right += result.front == expected
        recall += set(result.front) >= set(expected)
        saved += result.full / result.evaluated
        assert result.full == 50 * (6 if gain else 5) * EXAMPLES
    # At an error of 5 %, 30 repeats with 5 wrong ones or more have a chance of 1.6 %.
    assert recall >= right >= repeats - 4
    assert saved / repeats > 1.5


def test_a_tiny_error_gives_the_front_itself():
    for seed in range(10):
        arms, table = _task(100 + seed, arms=25, replicas=3, gain=seed % 2 == 0)
        assert pareto_race(arms, _from(table), EXAMPLES, error=1e-12).front == _front(arms, table)


def test_chance_is_kept_within_the_error_where_arms_are_hardly_apart():
    """Two arms whose difference is one example in a hundred: left out early only as often as the error allows."""
    wrong, repeats = 0, 200
    better, worse = (NoisyPrune(0.0, s) for s in (0.1, 0.2))
    arms = [FrontArm((worse,), known=(0.0,)), FrontArm((better,), known=(0.0,))]
    for seed in range(repeats):
        generator = np.random.default_rng(seed)
        base = generator.random(1000) < 0.5
        table = {better: base.copy(), worse: base.copy()}
        up, down = np.split(generator.permutation(1000)[:190], [100])
        table[better][up], table[worse][up] = True, False
        table[better][down], table[worse][down] = False, True
        wrong += pareto_race(arms, _from(table), 1000, error=0.2).front != (1,)
    assert wrong / repeats <= 0.2


def test_two_measured_and_a_known_objective():
    arms, table = _task(5, arms=30, gain=True)
    arms = [replace(arm, known=(float(i % 3),)) for i, arm in enumerate(arms)]
    result = pareto_race(arms, _from(table), EXAMPLES)
    assert result.front == _front(arms, table)
    points = _points(arms, table)
    for i, value in result.values.items():
        assert value == pytest.approx(points[i])


def test_survivors_saw_everything_and_nothing_is_evaluated_twice():
    arms, table = _task(1, gain=True)
    calls = []
    result = pareto_race(arms, _from(table, calls), EXAMPLES)
    seen = {}
    for variant, start, stop in calls:
        assert seen.get(variant, 0) == start
        seen[variant] = stop
    assert sum(stop - start for _, start, stop in calls) == result.evaluated
    for i in result.values:
        assert all(seen[v] == EXAMPLES for v in (*arms[i].variants, arms[i].baseline))
    alive = [rung.alive for rung in result.rungs]
    assert alive == sorted(alive, reverse=True)
    assert alive[-1] == len(result.values)


def test_the_last_rung_is_judged_by_the_final_values():
    arms, table = _task(2)
    generator = np.random.default_rng(0)
    rough = {v: row ^ (generator.random(EXAMPLES) < 0.005) for v, row in table.items()}
    calls, exact = [], []
    result = pareto_race(arms, _from(rough, calls), EXAMPLES, final=_from(table, exact))
    assert result.front == _front(arms, table)
    assert {(a, b) for _, a, b in exact} == {(0, EXAMPLES)}
    assert max(stop for _, _, stop in calls) < EXAMPLES
    assert result.evaluated == sum(b - a for _, a, b in (*calls, *exact))


def test_equal_arms_are_all_on_the_front():
    same = np.random.default_rng(0).random(500) < 0.5
    arms = [FrontArm((NoisyPrune(0.0, i / 10),), known=(1.0,)) for i in range(5)]
    result = pareto_race(arms, lambda v, a, b: same[a:b], 500)
    assert result.front == (0, 1, 2, 3, 4)


def test_a_tie_is_settled_by_the_known_objective():
    same = np.random.default_rng(0).random(500) < 0.5
    arms = [FrontArm((NoisyPrune(0.0, i / 10),), known=(i / 10,)) for i in range(5)]
    assert pareto_race(arms, lambda v, a, b: same[a:b], 500).front == (4,)


def test_one_arm_and_one_example():
    arm = FrontArm((NoisyPrune(0.0, 0.5),), known=(0.5,))
    result = pareto_race([arm], lambda v, a, b: np.ones(b - a), 100)
    assert (result.front, result.values) == ((0,), {0: (1.0, 0.5)})
    other = FrontArm((NoisyPrune(0.0, 0.6), NoisyPrune(0.0, 0.7)), known=(0.5,))
    assert pareto_race([arm, other], lambda v, a, b: np.ones(b - a), 1, replicas=1).front == (0, 1)


def test_without_known_objectives_the_front_is_the_best():
    arms, table = _task(7)
    arms = [replace(arm, known=()) for arm in arms]
    means = [p[0] for p in _points(arms, table)]
    assert pareto_race(arms, _from(table), EXAMPLES).front == (int(np.argmax(means)),)


def test_a_whole_loss_is_what_the_search_counts():
    arms, table = _task(8, arms=20, gain=True)
    result = pareto_race(arms, _from(table), EXAMPLES, whole_losses=True)
    for i, (_, gain) in result.values.items():
        noisy = [table[v].mean() for v in arms[i].variants]
        expected = accuracy_and_gain(noisy, table[arms[i].baseline].mean(), arms[i].factor)["gain"]
        assert gain == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 4), st.integers(1, 120), st.booleans(), st.booleans())
def test_any_shape_comes_to_an_end(seed, arms, replicas, examples, gain, whole):
    made, table = _task(seed, arms, replicas, examples, gain)
    options = {"first": 10, "replicas": 2, "error": 1e-9, "whole_losses": whole}
    result = pareto_race(made, _from(table), examples, **options)
    assert result.front == _front(made, table, whole)
    assert result.evaluated <= result.full
    assert result.rungs[-1].examples == examples


def test_what_is_refused():
    variant, plain = NoisyPrune(0.1, 0.5), NoisyPrune(0.0, 0.5)

    def zeros(v, a, b):
        return np.zeros(b - a)

    with pytest.raises(UsageError, match="without variants"):
        FrontArm(())
    with pytest.raises(UsageError, match="without one"):
        FrontArm((variant,), factor=0.5)
    with pytest.raises(UsageError, match="finite numbers"):
        FrontArm((variant,), known=(float("nan"),))
    with pytest.raises(UsageError, match="no arms"):
        pareto_race([], zeros, 10)
    with pytest.raises(UsageError, match="some arms have a baseline"):
        pareto_race([FrontArm((variant,)), FrontArm((variant,), plain)], zeros, 10)
    with pytest.raises(UsageError, match=r"\[0, 1\] known"):
        pareto_race([FrontArm((variant,)), FrontArm((plain,), known=(1.0,))], zeros, 10)
    with pytest.raises(UsageError, match="at most 1, got 2"):
        pareto_race([FrontArm((variant,), plain, 2.0)], zeros, 10, whole_losses=True)
    with pytest.raises(UsageError, match="error in"):
        pareto_race([FrontArm((variant,))], zeros, 10, error=0)
    with pytest.raises(DataError, match="finite"):
        pareto_race([FrontArm((variant,))], lambda v, a, b: np.full(b - a, np.nan), 10)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval(), list(zip(x.split(200), y.split(200), strict=True))


def _network_arms(gain):
    arms = []
    for sigma in (0.01, 0.03, 0.3, 1.0):
        for sparsity in (0.1, 0.5, 0.8, 0.9):
            noisy = tuple(NoisyPrune(sigma, sparsity, seed) for seed in range(4))
            plain = NoisyPrune(0.0, sparsity)
            arms.append(FrontArm(noisy, plain, sparsity) if gain else FrontArm(noisy, known=(sparsity,)))
    return arms


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_front_of_a_network_is_that_of_the_full_evaluation(digits, precision, gain):
    network, batches = digits
    bench, arms = Workbench(network), _network_arms(gain)
    result = race_front(bench, arms, batches, precision=precision)
    variants = list({v for a in arms for v in (*a.variants, *([a.baseline] if gain else []))})
    outcome = evaluate_variants(bench, variants, batches)
    table = {v: outcome.of(v) for v in variants}
    points = _points(arms, table)
    for i, value in result.values.items():
        assert value == pytest.approx(points[i], abs=1e-9)
    assert result.front == _front(arms, table)
    assert result.evaluated < result.full
    assert race_front(bench, arms, batches, precision=precision) == result


def test_what_the_network_race_refuses(digits):
    network, batches = digits
    with pytest.raises(SecateurError, match="float32"):
        race_front(Workbench(network), _network_arms(False), batches, precision="float16")
