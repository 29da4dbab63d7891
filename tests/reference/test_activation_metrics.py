"""DropNet's metrics and the Taylor score, against NumPy: C1, C4, and both normalizations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.targets import find_targets
from secateur.criteria.driver import score_targets
from secateur.criteria.mean_activation import MeanActivation
from secateur.criteria.taylor import Taylor
from secateur.sparsify.ranking import rank

# [sample, unit, position, position]
C1 = np.array([[[[1.0, 0], [2, 1]], [[0, 0], [0, 4]]], [[[3, 0], [0, 1]], [[0, 0], [0, 0]]]])


def _identity(units):
    network = nn.Sequential(nn.Conv2d(units, units, 1, bias=False), nn.Flatten()).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(units)[..., None, None])
    return network


def _scores(criterion, acts, **options):
    network = _identity(acts.shape[1])
    batches = [(torch.tensor(a), torch.zeros(len(a), dtype=torch.long)) for a in np.array_split(acts, 2)]
    (scores,) = score_targets(network, find_targets(network), [criterion], batches=batches, **options)
    return scores["0.weight"].numpy()


def test_c1_mean_activation():
    expected = np.abs(C1).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(expected, [1.0, 0.5])
    np.testing.assert_allclose(_scores(MeanActivation(), C1), expected)
    flipped = C1.copy()
    flipped[0, 0, 0, 0] = -1.0
    np.testing.assert_allclose(_scores(MeanActivation(), flipped), [1.0, 0.5])
    # What the published code computes there, and we do not.
    np.testing.assert_allclose(np.abs(flipped.mean(axis=(2, 3))).mean(axis=0), [0.75, 0.5])


def test_c4_minimum_and_maximum_drop_the_two_ends_of_one_ranking():
    acts = np.random.default_rng(0).normal(size=(7, 8, 2, 3)) * np.arange(1, 9)[:, None, None]
    expected = np.abs(acts).mean(axis=(0, 2, 3))
    np.testing.assert_allclose(_scores(MeanActivation(), acts), expected)
    np.testing.assert_allclose(_scores(MeanActivation(order="maximum"), acts), -expected)
    network, batches = _identity(8), [torch.tensor(acts)]
    order = np.argsort(expected)
    for removed in range(1, 8):
        gone = {}
        for end in ("minimum", "maximum"):
            masks = rank(network, MeanActivation(order=end), granularity="unit", batches=batches).masks(removed / 8)
            gone[end] = set(np.flatnonzero(~masks["0.weight"][:, 0, 0, 0].numpy()).tolist())
        assert gone["minimum"] == set(order[:removed].tolist())
        assert gone["maximum"] == set(order[8 - removed :].tolist())
        assert bool(gone["minimum"] & gone["maximum"]) == (removed > 4)


def test_taylor_of_both_kinds():
    generator = np.random.default_rng(1)
    acts, slopes = generator.normal(size=(5, 3, 2, 2)), generator.normal(size=(3, 2, 2))

    def loss(outputs, labels):
        return (outputs * torch.tensor(slopes).flatten()).sum(1).mean()

    # dC/dh is `slopes` for every sample: |mean over positions of g h|, then the mean over samples.
    raw = np.abs((acts * slopes).mean(axis=(2, 3))).mean(axis=0)
    np.testing.assert_allclose(_scores(Taylor(normalize=False), acts, loss=loss), raw)
    np.testing.assert_allclose(_scores(Taylor(), acts, loss=loss), raw / np.sqrt((raw**2).sum()))


def test_taylor_worked_number():
    h, g = np.array([[1.0, 2], [0, -1]]), torch.tensor([0.5, -0.25, 1.0, 2.0]).double()
    acts = np.stack([h, h])[:, None]
    got = _scores(Taylor(normalize=False), acts, loss=lambda outputs, labels: (outputs * g).sum(1).mean())
    assert got.tolist() == [0.5]
    assert _scores(Taylor(), acts, loss=lambda outputs, labels: (outputs * g).sum(1).mean()) == pytest.approx([1.0])
    # At a perfect fit there is nothing to normalize by.
    assert _scores(Taylor(), acts, loss=lambda outputs, labels: (outputs * 0).sum()).tolist() == [0.0]
