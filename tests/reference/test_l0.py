"""L0 against the worked numbers of its source, computed here in NumPy from the text alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.regularizers.hard_concrete import hard_concrete, keep_probability
from secateur.regularizers.l0 import L0
from secateur.regularizers.seeded import logistic_like

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1

# log_alpha: P(z > 0), P(z = 1), gate of evaluation, E[z].
WORKED = {
    -3.0: (0.197594, 0.009966, 0.0, 0.060419),
    -2.0: (0.400975, 0.026633, 0.043044, 0.142676),
    0.0: (0.831822, 0.168178, 0.5, 0.5),
    0.847298: (0.920261, 0.320538, 0.74, 0.678118),
    3.0: (0.990034, 0.802406, 1.0, 0.939581),
}


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _gate(log_alpha, u=None):
    s = _sigmoid(log_alpha) if u is None else _sigmoid((np.log(u) - np.log(1 - u) + log_alpha) / BETA)
    return np.clip(s * (ZETA - GAMMA) + GAMMA, 0, 1)


def _open(log_alpha):
    return _sigmoid(log_alpha - BETA * np.log(-GAMMA / ZETA))


@pytest.mark.parametrize("log_alpha", WORKED)
def test_worked_numbers(log_alpha):
    above_zero, one, at_test, mean = WORKED[log_alpha]
    uniform = (np.arange(400_000) + 0.5) / 400_000
    gates = _gate(log_alpha, uniform)
    np.testing.assert_allclose(_open(log_alpha), above_zero, atol=6e-7)
    np.testing.assert_allclose([(gates > 0).mean(), (gates == 1).mean()], [above_zero, one], atol=4e-6)
    np.testing.assert_allclose(_gate(log_alpha), at_test, atol=6e-7)
    np.testing.assert_allclose(gates.mean(), mean, atol=2e-6)

    ours = torch.tensor(log_alpha, dtype=torch.float64)
    np.testing.assert_allclose(keep_probability(ours), above_zero, atol=6e-7)
    np.testing.assert_allclose(hard_concrete(ours), at_test, atol=6e-7)
    np.testing.assert_allclose(hard_concrete(ours, torch.logit(torch.tensor(uniform))), gates, atol=1e-12)


def test_a_start_of_drop_rate_three_tenths():
    np.testing.assert_allclose(np.log(0.7 / 0.3), 0.847298, atol=6e-7)
    network = nn.Linear(4, 5000)
    with L0(drop_rate_init=0.3).attach(network) as attachment:
        start = attachment.learned["l0_log_alpha"].detach().numpy()
    # Five standard errors of a mean of 5000 normal numbers of deviation 0.01.
    assert abs(start.mean() - 0.847298) < 5 * 0.01 / np.sqrt(5000)
    assert 0.0095 < start.std() < 0.0105


def test_starts_beyond_ln_100_are_brought_within():
    with L0(drop_rate_init=0.001).attach(nn.Linear(4, 6)) as attachment:
        np.testing.assert_allclose(attachment.learned["l0_log_alpha"].detach(), np.log(100.0), rtol=1e-6)


@pytest.mark.parametrize("granularity", ["unit", "weight"])
def test_penalty_forward_evaluation_and_folding_of_a_linear_layer(granularity):
    generator = np.random.default_rng(0)
    layer = nn.Linear(3, 4).double()
    weight, bias, x = generator.normal(size=(4, 3)), generator.normal(size=4), generator.normal(size=(5, 3))
    log_alpha = generator.normal(size=4 if granularity == "unit" else (4, 3)) * 3
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    attachment = L0(granularity=granularity, factor=0.01).attach(layer, seed=3)
    with torch.no_grad():
        attachment.learned["l0_log_alpha"].copy_(torch.tensor(log_alpha))
    group = 3 if granularity == "unit" else 1
    np.testing.assert_allclose(attachment.penalty().item(), 0.01 * (group * _open(log_alpha)).sum(), rtol=1e-12)
    np.testing.assert_allclose(attachment.scores()["weight"], _open(log_alpha), rtol=1e-12)

    def output(gate):
        if granularity == "unit":
            return (x @ weight.T + bias) * gate
        return x @ (weight * gate).T + bias

    got = layer(torch.tensor(x))
    noise = logistic_like(torch.tensor(log_alpha), attachment._seeds["weight"]).numpy()
    np.testing.assert_allclose(got.detach(), output(_gate(log_alpha, _sigmoid(noise))), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(layer.eval()(torch.tensor(x)).detach(), output(_gate(log_alpha)), rtol=1e-12)
    masks = attachment.finalize()
    np.testing.assert_allclose(layer(torch.tensor(x)).detach(), output(_gate(log_alpha)), rtol=1e-12, atol=1e-15)
    rows = _gate(log_alpha).reshape(4, -1)
    np.testing.assert_array_equal(masks["weight"], np.broadcast_to(rows > 0, (4, 3)))
    np.testing.assert_allclose(layer.weight.detach(), weight * rows, rtol=1e-12)
    np.testing.assert_allclose(layer.bias.detach(), bias * (rows[:, 0] if granularity == "unit" else 1), rtol=1e-12)
