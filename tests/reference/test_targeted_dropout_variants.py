"""Targeted Dropout's variants against NumPy: Xtreme-k (ORACLE D3), one draw a weight, the ramp on both."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.lab.models import build_model
from secateur.regularizers.stream import NoiseStream
from secateur.regularizers.targeted_dropout import TargetedDropout

DONE = Progress(1, 1, 1)


def _linear(matrix):
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(matrix))
    (target,) = find_targets(layer)
    return layer, target


def _multiplier(spec, layer, target, stream=None, progress=DONE):
    found = spec.multiplier(target, layer.weight.detach(), stream or NoiseStream(0), progress)
    return torch.ones(target.shape) if found is None else found.expand(target.shape).float()


def _layers_of_the_paper():
    """Filters and fan-in of the prunable convolutions, from the text: stages 32/64/128, five units of two 3x3
    convolutions, a 1x1 projection at the head of each stage, stem of 16 and logits left out."""
    layers, inputs = [], 16
    for width in (32, 64, 128):
        layers.append((width, inputs))
        for _ in range(5):
            layers += [(width, inputs * 9), (width, width * 9)]
            inputs = width
    return layers


@pytest.mark.parametrize(("k", "percent"), [(3, 99.600), (4, 99.467)])
def test_d3_xtreme_on_the_papers_resnet_32(k, percent):
    layers = _layers_of_the_paper()
    weights, filters = sum(n * f for n, f in layers), sum(n for n, _ in layers)
    assert (weights, filters) == (1_849_344, 2_464)
    assert round(100 * (1 - k * filters / weights), 3) == percent
    network = build_model("td_resnet32", num_classes=10, in_shape=(3, 32, 32), seed=0)
    targets = find_targets(network, exclude=["stem", "logits"])
    assert sorted((t.units, t.fan_in) for t in targets) == sorted(layers)
    spec, kept = TargetedDropout(keep_per_unit=k, alpha=1.0), 0
    for target in targets:
        weight = network.get_parameter(target.name).detach()
        rows = target.rows(spec.multiplier(target, weight, NoiseStream(0), DONE))
        assert bool((rows.sum(1) == k).all())
        kept += int(rows.sum())
    assert round(100 * (1 - kept / weights), 3) == percent


@pytest.mark.parametrize("k", [0, 1, 3, 10, 12])
def test_keep_per_unit_leaves_the_k_largest(k):
    matrix = np.random.default_rng(k).normal(size=(7, 10))
    layer, target = _linear(matrix)
    expected = np.zeros((7, 10))
    for row, values in enumerate(np.abs(matrix)):
        expected[row, np.argsort(-values)[:k]] = 1.0
    got = _multiplier(TargetedDropout(keep_per_unit=k, alpha=1.0), layer, target)
    np.testing.assert_array_equal(got.numpy(), expected)


def test_keep_per_unit_under_the_ramp():
    layer, target = _linear(np.random.default_rng(0).normal(size=(20, 40)))
    spec = TargetedDropout(keep_per_unit=4, alpha=1.0, ramp=True)
    # 36 of 40 in the end; the text's ramp takes gamma to 95 % of that at a fifth of the run, alpha to one half.
    assert bool((_multiplier(spec, layer, target, progress=Progress(0, 100, 1)) == 1).all())
    halfway = _multiplier(spec, layer, target, NoiseStream(1), Progress(20, 100, 1))
    candidates = math.floor(0.95 * 36)
    assert int((halfway == 0).sum(1).max()) <= candidates
    assert abs(int((halfway == 0).sum()) - 20 * candidates / 2) < 5 * math.sqrt(20 * candidates) / 2
    assert bool(((_multiplier(spec, layer, target, progress=Progress(40, 100, 1)) == 0).sum(1) == 36).all())


def _candidate_units(matrix, gamma):
    norms = np.sqrt((matrix**2).sum(1))
    return np.isin(np.arange(len(matrix)), np.argsort(norms, kind="stable")[: int(gamma * len(matrix))])


def test_one_draw_a_weight_touches_candidate_units_only_and_splits_them():
    matrix = np.random.default_rng(3).normal(size=(40, 50))
    layer, target = _linear(matrix)
    spec = TargetedDropout(gamma=0.5, alpha=0.6, granularity="unit", draw="weight")
    stream, draws, total = NoiseStream(5), 50, np.zeros((40, 50))
    candidates = _candidate_units(matrix, 0.5)
    for _ in range(draws):
        kept = _multiplier(spec, layer, target, stream).numpy()
        assert set(np.unique(kept)) <= {0.0, 1.0}
        assert (kept[~candidates] == 1).all()
        # Fifty coins of .6 all on one side: never.
        assert (kept[candidates].sum(1) > 0).all()
        assert (kept[candidates].sum(1) < 50).all()
        total += kept
    count = draws * candidates.sum() * 50
    assert abs(total[candidates].sum() / count - 0.4) < 5 * math.sqrt(0.24 / count)
    # Each weight on its own: the variance of a unit's kept share is that of 50 independent coins.
    shares = total[candidates].mean(1) / draws
    assert np.all(np.abs(shares - 0.4) < 5 * math.sqrt(0.24 / (50 * draws)))


def test_both_draws_have_one_expectation():
    layer, target = _linear(np.random.default_rng(4).normal(size=(100, 20)))
    for draw, coins in (("unit", 100), ("weight", 2000)):
        spec = TargetedDropout(gamma=0.66, alpha=0.75, granularity="unit", draw=draw)
        stream, draws = NoiseStream(2), 300
        kept = np.mean([_multiplier(spec, layer, target, stream).mean().item() for _ in range(draws)])
        error = math.sqrt(0.66 * coins * draws * 0.75 * 0.25) / (coins * draws)
        assert abs(kept - (1 - 0.66 * 0.75)) < 5 * error


@pytest.mark.parametrize("draw", ["unit", "weight"])
def test_d6_alpha_and_gamma_at_their_ends(draw):
    matrix = np.random.default_rng(6).normal(size=(8, 5))
    layer, target = _linear(matrix)
    for gamma, alpha in ((0.0, 0.7), (0.7, 0.0)):
        spec = TargetedDropout(gamma=gamma, alpha=alpha, granularity="unit", draw=draw)
        assert spec.multiplier(target, layer.weight.detach(), NoiseStream(0), DONE) is None
    hard = _multiplier(TargetedDropout(gamma=0.5, alpha=1.0, granularity="unit", draw=draw), layer, target)
    np.testing.assert_array_equal((hard == 0).all(1).numpy(), _candidate_units(matrix, 0.5))
    np.testing.assert_array_equal((hard == 1).all(1).numpy(), ~_candidate_units(matrix, 0.5))
