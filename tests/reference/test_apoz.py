"""Shares of zeros against NumPy: C1 by single activations, and by whole maps as DropNet's code counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.targets import find_targets
from secateur.criteria.apoz import APoZ
from secateur.criteria.driver import score_targets

C1 = np.array([[[[1.0, 0], [2, 1]], [[0, 0], [0, 4]]], [[[3, 0], [0, 1]], [[0, 0], [0, 0]]]])


def _network(units, linear=False):
    layer = nn.Linear(units, units, bias=False) if linear else nn.Conv2d(units, units, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(units).reshape(layer.weight.shape))
    return nn.Sequential(layer, nn.ReLU()).double()


def _zeros(acts, per_map, sizes=(1, 1), linear=False):
    network = _network(acts.shape[-1] if linear else acts.shape[1], linear)
    batches = torch.tensor(acts).split(sizes)
    (scores,) = score_targets(network, find_targets(network), [APoZ(per_map=per_map)], batches=batches)
    return 1.0 - scores["0.weight"].numpy()


def test_c1():
    elementwise = (C1 == 0).mean(axis=(0, 2, 3))
    by_map = (C1.mean(axis=(2, 3)) == 0).mean(axis=0)
    np.testing.assert_allclose(elementwise, [0.375, 0.875])
    np.testing.assert_allclose(by_map, [0.0, 0.5])
    np.testing.assert_allclose(_zeros(C1, per_map=False), elementwise)
    np.testing.assert_allclose(_zeros(C1, per_map=True), by_map)


@pytest.mark.parametrize("per_map", [False, True])
def test_sparse_maps_and_any_split_into_batches(per_map):
    generator = np.random.default_rng(0)
    acts = generator.normal(size=(12, 5, 2, 2)) - np.arange(5)[:, None, None] * 0.5
    fired = np.maximum(acts, 0)
    expected = (fired.mean(axis=(2, 3)) == 0 if per_map else fired == 0).mean(axis=0)
    expected = expected if per_map else expected.mean(axis=(1, 2))
    assert len(set(expected)) > 2
    for sizes in ([12], [5, 7], [1] * 12):
        np.testing.assert_allclose(_zeros(acts, per_map, sizes), expected)


def test_units_without_positions_and_tokens():
    generator = np.random.default_rng(1)
    flat = generator.normal(size=(9, 4))
    np.testing.assert_allclose(_zeros(flat, True, [9], linear=True), (flat <= 0).mean(axis=0))
    np.testing.assert_allclose(_zeros(flat, True, [9], linear=True), _zeros(flat, False, [9], linear=True))
    tokens = generator.normal(size=(9, 3, 4))
    by_sample = (np.maximum(tokens, 0).mean(axis=1) == 0).mean(axis=0)
    np.testing.assert_allclose(_zeros(tokens, True, [4, 5], linear=True), by_sample)


def test_a_signed_map_that_averages_to_zero_counts_by_map_alone():
    network = _network(1)[:1]
    for per_map, zeros in ((True, 1.0), (False, 0.0)):
        batches = [torch.tensor([[[[1.0, -1.0], [2.0, -2.0]]]]).double()]
        (scores,) = score_targets(network, find_targets(network), [APoZ(per_map=per_map)], batches=batches)
        assert scores["0.weight"].tolist() == [1.0 - zeros]
