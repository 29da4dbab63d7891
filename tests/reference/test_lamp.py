"""LAMP's scores against its formula in NumPy, and the sparsity it shares out between layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.targets import find_targets
from secateur.criteria.driver import score_targets
from secateur.criteria.lamp import Lamp
from secateur.criteria.magnitude import Magnitude
from secateur.sparsify.ranking import SelectionRule, rank


def _lamp(weights):
    """The formula, weight by weight: those that rank no lower are the larger ones and equal ones of higher index."""
    w = np.asarray(weights, dtype=float).ravel()
    scores = [
        w[i] ** 2
        / sum(w[j] ** 2 for j in range(w.size) if abs(w[j]) > abs(w[i]) or (abs(w[j]) == abs(w[i]) and j >= i))
        for i in range(w.size)
    ]
    return np.reshape(scores, np.shape(weights))


def _layers(*rows):
    network = nn.Sequential(*(nn.Linear(len(row), 1, bias=False) for row in rows))
    with torch.no_grad():
        for layer, row in zip(network, rows, strict=True):
            layer.weight.copy_(torch.tensor([row]))
    return network


def _scores(network):
    (scores,) = score_targets(network, find_targets(network), [Lamp()])
    return [s.numpy() for s in scores.values()]


@pytest.mark.parametrize(
    ("weights", "printed"),
    [
        ([1.0, -2.0, 3.0, -4.0], [0.033333, 0.137931, 0.36, 1.0]),
        ([0.1, 0.2, 0.3], [0.071429, 0.307692, 1.0]),
        ([1.0, 2.0], [0.2, 1.0]),
        # The formula alone, with its "at least as large", would give 1/6 to both ones; order of index settles it.
        ([1.0, 1.0, 2.0], [0.166667, 0.2, 1.0]),
    ],
)
def test_e2_scores(weights, printed):
    expected = _lamp(weights)
    np.testing.assert_allclose(expected, printed, atol=5e-7)
    (got,) = _scores(_layers(weights))
    np.testing.assert_allclose(got[0], expected, rtol=1e-6)


def test_e2_joint_prune_of_two_in_five():
    network = _layers([0.1, 0.2, 0.3], [1.0, 2.0])
    rule = SelectionRule(scope="global", min_keep=0)
    by_lamp = rank(network, Lamp(), rule=rule).masks(0.4)
    assert [m[0].tolist() for m in by_lamp.values()] == [[False, True, True], [False, True]]
    by_magnitude = rank(network, Magnitude(), rule=rule).masks(0.4)
    assert [m[0].tolist() for m in by_magnitude.values()] == [[False, False, True], [True, True]]


def test_e2_no_layer_is_emptied():
    generator = np.random.default_rng(3)
    network = _layers(*((scale * generator.normal(size=9)).tolist() for scale in (1e-6, 1.0, 1e6)))
    for scores in _scores(network):
        assert scores.max() == 1.0
    rule = SelectionRule(scope="global", min_keep=0)
    assert [kept for _, kept, _ in rank(network, Lamp(), rule=rule).masks(24 / 27).layers()] == [1, 1, 1]
    assert [kept for _, kept, _ in rank(network, Magnitude(), rule=rule).masks(24 / 27).layers()] == [0, 0, 3]


@pytest.mark.parametrize("seed", range(5))
def test_random_convolutions_with_ties_and_zeros(seed):
    generator = np.random.default_rng(seed)
    layer = nn.Conv2d(3, 5, 3)
    values = np.round(generator.normal(size=(5, 3, 3, 3)), 1)
    values[generator.random(values.shape) < 0.2] = 0.0
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(values))
    (got,) = _scores(layer)
    np.testing.assert_allclose(got, _lamp(layer.weight.detach().double().numpy()), rtol=1e-12)
    # Within the layer the order is that of magnitude.
    order = np.argsort(np.abs(layer.weight.detach().numpy()).ravel(), kind="stable")
    assert (np.diff(got.ravel()[order][(values != 0).ravel()[order]]) > 0).all()


def test_a_layer_of_zeros_scores_zero():
    (got,) = _scores(_layers([0.0, 0.0]))
    assert got.tolist() == [[0.0, 0.0]]
