"""The L1 penalty against NumPy written from its formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.targets import find_targets
from secateur.regularizers.l1 import L1

# The weight matrix of the source's worked examples, [in, out].
W = np.array([[0.1, -0.9, 0.3], [-0.4, 0.2, 0.05], [0.7, 0.6, -0.8], [-0.2, -0.3, 0.5]])
V = np.array([[0.5, 0.0, -2.0], [1.0, -0.25, 0.25]])


def _network():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor(W.T))
        network[2].weight.copy_(torch.tensor(V))
    return network


# Sums 5.05 and 4, means over 12 and 6 entries.
@pytest.mark.parametrize(
    ("reduction", "expected"), [("sum", 0.1 * (5.05 + 4.0)), ("mean_per_tensor", 0.1 * (5.05 / 12 + 4.0 / 6))]
)
def test_value_and_gradient(reduction, expected):
    by_tensor = [np.abs(m).sum() if reduction == "sum" else np.abs(m).mean() for m in (W, V)]
    assert 0.1 * sum(by_tensor) == pytest.approx(expected, abs=1e-12)
    network = _network()
    with L1(0.1, reduction).attach(network) as attachment:
        penalty = attachment.penalty()
        penalty.backward()
    assert float(penalty.detach()) == pytest.approx(expected, abs=1e-12)
    for layer, matrix in ((network[0], W.T), (network[2], V)):
        share = 1.0 if reduction == "sum" else 1.0 / matrix.size
        np.testing.assert_allclose(layer.weight.grad.numpy(), 0.1 * share * np.sign(matrix), atol=1e-12)
        assert layer.bias.grad is None


def test_mean_per_tensor_counts_every_tensor_alike():
    network = _network()
    with L1(1.0, "mean_per_tensor").attach(network, find_targets(network, exclude=["@last"])) as attachment:
        assert float(attachment.penalty().detach()) == pytest.approx(np.abs(W).mean())
    assert network[2].weight.grad is None
