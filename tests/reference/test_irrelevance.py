"""Irrelevance regularization against NumPy: factor * sum exp(-|dL/dw|) w^2, the exponential held constant."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.regularizers.irrelevance import Irrelevance

# The linear network of the source's worked example (F1): f = W2 W1 x = 3, L = (f - y)^2 / 2, dL/df = 2.
W1, W2 = np.array([[1.0, 2.0], [-1.0, 1.0]]), np.array([[1.0, -2.0]])
G1, G2 = np.array([[2.0, 2.0], [-4.0, -4.0]]), np.array([[6.0, 0.0]])
X, Y = np.array([1.0, 1.0]), 1.0


def _loss(w1, w2):
    return 0.5 * float(((w2 @ w1 @ X).item() - Y) ** 2)


def _objective(w1, w2, factor):
    """The stated objective, with the exponentials of the gradients at W1, W2."""
    return _loss(w1, w2) + factor * ((np.exp(-np.abs(G1)) * w1**2).sum() + (np.exp(-np.abs(G2)) * w2**2).sum())


def _network():
    network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor(W1))
        network[1].weight.copy_(torch.tensor(W2))
    return network


def _gradients(network, factor, scale=1.0):
    with Irrelevance(factor).attach(network) as attachment:
        loss = 0.5 * (network(torch.tensor(X)) - Y).square().sum()
        penalty = attachment.penalty()
        assert float(penalty.detach()) == 0.0
        ((loss + penalty) * scale).backward()
    return network[0].weight.grad.numpy() / scale, network[1].weight.grad.numpy() / scale


@pytest.mark.parametrize("scale", [1.0, 0.25, 65536.0])
def test_worked_example(scale):
    g1, g2 = _gradients(_network(), 0.5, scale)
    np.testing.assert_allclose(g1, G1 + np.exp(-np.abs(G1)) * W1, rtol=1e-12)
    np.testing.assert_allclose(g2, G2 + np.exp(-np.abs(G2)) * W2, rtol=1e-12)
    # By hand: 2 * 0.5 * exp(-2) * 1, and a weight the loss does not react to, 2 * 0.5 * exp(0) * -2.
    assert g1[0, 0] == pytest.approx(2.1353352832366127)
    assert g2[0, 1] == pytest.approx(-2.0)


def test_finite_differences_of_the_objective():
    got, epsilon = _gradients(_network(), 0.3), 1e-6
    for which, (start, grad) in enumerate(zip((W1, W2), got, strict=True)):
        for index in np.ndindex(start.shape):
            values = []
            for step in (epsilon, -epsilon):
                moved = [W1.copy(), W2.copy()]
                moved[which][index] += step
                values.append(_objective(*moved, 0.3))
            assert grad[index] == pytest.approx((values[0] - values[1]) / (2 * epsilon), rel=1e-7, abs=1e-7)
