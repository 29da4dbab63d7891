"""Variational dropout against the worked numbers of its source, computed here in NumPy from the text alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.duration import Progress
from secateur.regularizers.seeded import normal_like
from secateur.regularizers.variational import divergence, log_alpha_of
from secateur.regularizers.variational_dropout import VariationalDropout

KL = {-8.0: 4.635899, -3.0: 2.115590, 0.0: 0.431239, 3.0: 0.025420, 8.0: 0.000168}
LEARNED = "variational_dropout_log_sigma2"


def _divergence(log_alpha):
    k1, k2, k3 = 0.63576, 1.8732, 1.48695
    return -(k1 / (1 + np.exp(-(k2 + k3 * log_alpha))) - 0.5 * np.log(1 + np.exp(-log_alpha)) - k1)


def _log_alpha(weight, log_sigma2):
    return log_sigma2 - np.log(weight**2 + 1e-8)


@pytest.mark.parametrize("log_alpha", KL)
def test_worked_divergences(log_alpha):
    np.testing.assert_allclose(_divergence(log_alpha), KL[log_alpha], atol=6e-7)
    np.testing.assert_allclose(divergence(torch.tensor(log_alpha, dtype=torch.float64)), KL[log_alpha], atol=6e-7)


def test_the_divergence_is_near_the_integral_it_stands_for():
    # KL(N(1, alpha) || 1/|w|) = -ln(alpha)/2 + E ln|1 + sqrt(alpha) e| + C, with C such that it ends at 0.
    e = np.random.default_rng(0).normal(size=1_000_000)
    limit = np.log(np.abs(e)).mean()
    for log_alpha in (-3.0, 0.0, 3.0):
        exact = -0.5 * log_alpha + np.log(np.abs(1 + np.exp(log_alpha / 2) * e)).mean() - limit
        # The approximation is good to some hundredths, the mean to a few thousandths.
        assert abs(exact - _divergence(log_alpha)) < 0.02


def test_worked_thresholds():
    np.testing.assert_allclose(np.exp(3) / (1 + np.exp(3)), 0.952574, atol=6e-7)
    for weight, expected in ((0.001, 3.8056), (0.01, -0.78976)):
        np.testing.assert_allclose(_log_alpha(weight, -10.0), expected, atol=6e-5)
        ours = log_alpha_of(torch.tensor(weight, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64))
        np.testing.assert_allclose(ours, _log_alpha(weight, -10.0), rtol=1e-12)
    # The size below which weights would be pruned at the start is worked out without the 1e-8, which moves it a little.
    np.testing.assert_allclose(np.exp((-10 - 3) / 2), 0.0015034, atol=6e-8)
    np.testing.assert_allclose(np.sqrt(np.exp(-10 - 3) - 1e-8), 0.0015001, atol=6e-8)
    layer = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0015000, -0.0015002]]))
    assert VariationalDropout().attach(layer).finalize()["weight"].tolist() == [[False, True]]


def test_penalty_forward_evaluation_and_folding_of_a_linear_layer():
    generator = np.random.default_rng(0)
    layer = nn.Linear(3, 4).double()
    weight, bias, x = generator.normal(size=(4, 3)), generator.normal(size=4), generator.normal(size=(5, 3))
    log_sigma2 = generator.normal(size=(4, 3)) * 6
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    attachment = VariationalDropout(factor=0.01, warmup=0.5).attach(layer, seed=3)
    with torch.no_grad():
        attachment.learned[LEARNED].copy_(torch.tensor(log_sigma2))
    log_alpha = np.clip(_log_alpha(weight, log_sigma2), -8, 8)
    assert (np.abs(log_alpha) == 8).any()
    np.testing.assert_allclose(attachment.scores()["weight"], -_log_alpha(weight, log_sigma2), rtol=1e-12)

    got = layer(torch.tensor(x)).detach().numpy()
    noise = normal_like(torch.tensor(got), attachment._seeds["weight"]).numpy()
    deviation = np.sqrt(x**2 @ (np.exp(log_alpha) * weight**2).T + 1e-8)
    np.testing.assert_allclose(got, x @ weight.T + bias + deviation * noise, rtol=1e-10)

    for step, share in ((0, 0.0), (1, 0.5), (2, 1.0), (3, 1.0)):
        if step:
            layer(torch.tensor(x))
            attachment.after_step(Progress(step, 4, 1))
        np.testing.assert_allclose(attachment.penalty().detach(), share * 0.01 * _divergence(log_alpha).sum(), 1e-10)

    kept = log_alpha < 3
    assert 0 < kept.sum() < 12
    np.testing.assert_allclose(layer.eval()(torch.tensor(x)).detach(), x @ (weight * kept).T + bias, rtol=1e-12)
    np.testing.assert_array_equal(attachment.finalize()["weight"], kept)
    np.testing.assert_allclose(layer.weight.detach(), weight * kept, rtol=1e-15)
    np.testing.assert_allclose(layer.bias.detach(), bias, rtol=1e-15)
