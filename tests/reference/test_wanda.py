"""Wanda's worked numbers, and its scores on random layers, against NumPy."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from secateur.core.targets import find_targets
from secateur.criteria.driver import gather_evidence, score_targets
from secateur.criteria.wanda import Wanda
from secateur.sparsify.ranking import SelectionRule, rank

X = np.array([[1.0, 2.0, 0.0], [3.0, 0.0, 4.0]])
W = np.array([[1.0, -1.0, 0.5], [0.2, 2.0, -1.0]])


def _layer(weights):
    layer = nn.Linear(*weights.shape[::-1], bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weights))
    return layer


def test_worked_numbers():
    norms = np.sqrt((X**2).sum(axis=0))
    np.testing.assert_allclose(norms, [3.162278, 2, 4], atol=5e-7)
    expected = np.abs(W) * norms
    np.testing.assert_allclose(expected, [[3.162278, 2, 2], [0.632456, 4, 4]], atol=5e-7)
    layer = _layer(W)
    for batches in ([torch.tensor(X)], list(torch.tensor(X).split(1))):
        evidence = gather_evidence(layer, find_targets(layer), frozenset({"input_norm"}), batches=batches)
        np.testing.assert_allclose(evidence["weight"].input_norm, [norms, norms])
        (scores,) = score_targets(layer, find_targets(layer), [Wanda()], batches=batches)
        np.testing.assert_allclose(scores["weight"].numpy(), expected)


def test_one_weight_of_each_row_goes():
    layer = _layer(W)
    ranking = rank(layer, Wanda(), rule=SelectionRule(scope="column"), batches=[torch.tensor(X)])
    # In the first row entries 1 and 2 tie; the lower index goes.
    assert ranking.masks(1 / 3)["weight"].tolist() == [[True, False, True], [False, True, True]]
    # Over the whole layer two of the second row's and first row's smallest compete instead.
    layerwise = rank(layer, Wanda(), batches=[torch.tensor(X)]).masks(1 / 2)
    assert layerwise["weight"].tolist() == [[True, False, False], [False, True, True]]


def test_rows_of_random_layers_lose_equally_many():
    generator = np.random.default_rng(0)
    weights, tokens = generator.normal(size=(6, 9)), generator.normal(size=(4, 5, 9))
    layer = _layer(weights)
    scores = np.abs(weights) * np.sqrt((tokens**2).sum(axis=(0, 1)))
    kept = np.ones_like(weights, dtype=bool)
    for row, order in enumerate(np.argsort(scores, axis=1)):
        kept[row, order[:4]] = False
    ranking = rank(layer, Wanda(), rule=SelectionRule(scope="column"), batches=list(torch.tensor(tokens)))
    assert ranking.masks(0.5)["weight"].tolist() == kept.tolist()
