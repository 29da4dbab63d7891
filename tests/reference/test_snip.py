"""SNIP on the linear network of F1, and as a share of the whole network."""

from __future__ import annotations

import linear_network as f1
import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.targets import find_targets
from secateur.criteria.driver import score_targets
from secateur.criteria.saliency import Saliency
from secateur.criteria.snip import Snip
from secateur.sparsify.ranking import SelectionRule, rank


def test_f1():
    f, gradient, _ = f1.derivatives()
    assert f == 3.0
    g1, g2 = f1.split(gradient)
    assert g1.tolist() == [[2, 2], [-4, -4]]
    assert g2.tolist() == [[6, 0]]
    expected = [np.abs(g1 * f1.W1), np.abs(g2 * f1.W2)]
    assert [e.tolist() for e in expected] == [[[2, 4], [4, 4]], [[6, 0]]]
    total = sum(e.sum() for e in expected)
    assert total == 20
    network = f1.network()
    for copies in ((1,), (2, 1, 5)):
        (scores,) = score_targets(
            network, find_targets(network), [Snip()], batches=f1.batches(copies), loss=f1.half_squares
        )
        for score, numbers in zip(scores.values(), expected, strict=True):
            np.testing.assert_allclose(score.numpy(), numbers / 20)


def test_f1_global_selection_keeps_the_largest():
    network = f1.network()
    rule = SelectionRule(scope="global", min_keep=0)
    ranking = rank(network, Snip(), rule=rule, batches=f1.batches(), loss=f1.half_squares)
    masks = ranking.masks(2 / 6)
    assert [m.tolist() for m in masks.values()] == [[[False, True], [True, True]], [[True, False]]]
    assert [m.tolist() for m in ranking.masks(5 / 6).values()] == [[[False, False], [False, False]], [[True, False]]]


def test_shares_sum_to_one_and_rank_like_saliency():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    batches = [(torch.randn(5, 2, 4, 4).double(), torch.arange(5) % 3)]
    snip, saliency = score_targets(network, find_targets(network), [Snip(), Saliency()], batches=batches)
    assert sum(float(s.sum()) for s in snip.values()) == pytest.approx(1.0)
    total = sum(float(s.sum()) for s in saliency.values())
    for name, score in snip.items():
        torch.testing.assert_close(score * total, saliency[name])


def test_vanished_gradients_leave_zeros():
    network = f1.network()
    (scores,) = score_targets(
        network, find_targets(network), [Snip()], batches=f1.batches(), loss=lambda o, y: (o * 0).sum()
    )
    assert all(not bool(s.any()) for s in scores.values())
