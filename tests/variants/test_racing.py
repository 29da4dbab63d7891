"""Races of real networks end with the winner of the full evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from secateur.errors import SecateurError, UsageError
from secateur.variants import Arm, NoisyPrune, Workbench, evaluate_variants, race_variants


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


def _arms(seeds=4):
    return [
        Arm(tuple(NoisyPrune(sigma, sparsity, seed) for seed in range(seeds)))
        for sigma in (0.0, 0.03, 0.3, 1.0)
        for sparsity in (0.1, 0.5, 0.8, 0.9)
    ]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_winner_is_that_of_the_full_evaluation(digits, precision):
    network, batches = digits
    bench, arms = Workbench(network), _arms()
    result = race_variants(bench, arms, batches, precision=precision)
    outcome = evaluate_variants(bench, [v for arm in arms for v in arm.variants], batches)
    means = outcome.means().reshape(len(arms), -1).mean(1)
    for i, value in result.values.items():
        assert value == pytest.approx(means[i], abs=1e-9)
    assert means[result.winners[0]] == means.max()
    if precision == "float32":
        assert result.evaluated < 0.8 * result.full
    assert all(rung.alive >= 1 for rung in result.rungs)


def test_the_order_is_random_but_fixed(digits):
    network, batches = digits
    arms = _arms(2)
    first, again, other = (race_variants(Workbench(network), arms, batches, seed=s) for s in (1, 1, 2))
    assert first == again
    assert first.rungs != other.rungs or first.values == other.values
    assert np.isclose(first.values[first.winners[0]], other.values[other.winners[0]])


def test_what_is_refused(digits):
    network, batches = digits
    with pytest.raises(SecateurError, match="float32"):
        race_variants(Workbench(network), _arms(), batches, precision="float16")
    with pytest.raises(UsageError, match="must be tensors"):
        race_variants(Workbench(network), _arms(), [({"x": batches[0][0]}, batches[0][1])])
