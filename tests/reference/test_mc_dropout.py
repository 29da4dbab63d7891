"""Monte-Carlo dropout against the worked example, NumPy and a network whose moments are known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.analysis.mc_dropout import mc_predict


class Recited(nn.Module):
    """Says the given outputs one after the other, whatever it is asked."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs, self.calls, self.dropout = outputs, 0, nn.Dropout(0.5)

    def forward(self, x):
        self.calls += 1
        return self.outputs[self.calls - 1].expand(len(x), -1)


def test_the_worked_example():
    y = np.array([[1.0, 0.0], [2.0, 1.0], [3.0, 2.0]])
    mean, variance = y.mean(0), (y**2).mean(0) - y.mean(0) ** 2
    np.testing.assert_allclose(mean, [2, 1])
    np.testing.assert_allclose(variance, [0.6667, 0.6667], atol=5e-5)
    got = mc_predict(Recited(torch.tensor(y)), torch.zeros(1, 2), passes=3)
    np.testing.assert_allclose(got.mean[0], mean)
    np.testing.assert_allclose(got.variance[0], variance)
    assert got.passes == 3
    with_noise = mc_predict(Recited(torch.tensor(y)), torch.zeros(1, 2), passes=3, precision=4.0)
    np.testing.assert_allclose(with_noise.variance[0], variance + 0.25)
    np.testing.assert_allclose(with_noise.mean[0], mean)


@pytest.mark.parametrize("passes", [2, 7, 100])
def test_streaming_equals_all_outputs_at_once(passes):
    # A large mean with a small spread: the difference of squares would lose it in float32.
    y = 1000.0 + np.random.default_rng(passes).normal(size=(passes, 5))
    got = mc_predict(Recited(torch.tensor(y, dtype=torch.float32)), torch.zeros(2, 1), passes=passes)
    exact = y.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(got.mean, np.tile(exact.mean(0), (2, 1)), rtol=1e-6)
    np.testing.assert_allclose(got.variance, np.tile(exact.var(0), (2, 1)), rtol=2e-3)


def test_dropout_in_front_of_a_linear_layer_in_closed_form():
    """y = w . (x m / (1 - p)): mean w . x, variance p / (1 - p) sum of (w x)^2."""
    rate, passes = 0.3, 4000
    layer = nn.Linear(6, 1, bias=False)
    network = nn.Sequential(nn.Dropout(rate), layer).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(1, 6, generator=generator))
    x = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    got = mc_predict(network, x, passes=passes, seed=1)
    products = (layer.weight.detach() * x).numpy()
    mean, variance = products.sum(1), rate / (1 - rate) * (products**2).sum(1)
    assert np.all(np.abs(got.mean[:, 0].numpy() - mean) < 5 * np.sqrt(variance / passes))
    # Standard error of a variance from its fourth moment; the sum of six terms is lighter-tailed than kurtosis 6.
    assert np.all(np.abs(got.variance[:, 0].numpy() - variance) < 5 * variance * np.sqrt(5 / passes))
