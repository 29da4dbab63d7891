"""Smallify against the worked numbers of its source, computed here in NumPy from the text alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.duration import Progress
from secateur.regularizers.gates import sign_statistics
from secateur.regularizers.smallify import Smallify

# Signs of a gate that starts positive: variances, means, and the step that closes it (from 1).
WORKED = [
    ([1, -1, 1, -1], [0, 0.4, 0.364, 0.65884], [1, 0.8, 0.82, 0.638], 4),
    ([-1, -1], [0.4, 0.684], [0.8, 0.62], 2),
]


def _statistics(signs, decay=0.9):
    mean, variance, found = 1.0, 0.0, []
    for sign in signs:
        variance = decay * variance + (1 - decay) * (sign - mean) ** 2
        mean = decay * mean + (1 - decay) * sign
        found.append((variance, mean))
    return np.array(found).T


@pytest.mark.parametrize(("signs", "variances", "means", "closed"), WORKED)
def test_worked_sequences(signs, variances, means, closed):
    np.testing.assert_allclose(_statistics(signs), [variances, means], atol=1e-12)
    assert [v > 0.5 for v in variances].index(True) + 1 == closed
    mean, variance = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for sign, v, m in zip(signs, variances, means, strict=True):
        mean, variance = sign_statistics(torch.tensor(float(sign), dtype=torch.float64), mean, variance, 0.9)
        np.testing.assert_allclose([float(variance), float(mean)], [v, m], atol=1e-12)


@pytest.mark.parametrize(("signs", "variances", "means", "closed"), WORKED)
def test_a_gate_is_closed_when_the_numbers_say_and_for_good(signs, variances, means, closed):
    layer = nn.Linear(3, 2)
    with Smallify().attach(layer) as attachment:
        gate = attachment.learned["smallify_gate"]
        for step, sign in enumerate([*signs, 1, 1, 1], 1):
            with torch.no_grad():
                gate.copy_(torch.tensor([0.5 * sign, 0.5]))
            attachment.after_step(Progress(step, 10, 1))
            assert gate.tolist() == [0.5 * sign if step < closed else 0.0, 0.5]
            if step <= len(variances):
                np.testing.assert_allclose(
                    attachment.state_dict()["variance/weight"][0], variances[step - 1], rtol=1e-6
                )
                np.testing.assert_allclose(attachment.state_dict()["mean/weight"][0], means[step - 1], rtol=1e-6)
        assert attachment.scores()["weight"].tolist() == [0.0, 0.5]
        masks = attachment.finalize()
    assert masks["weight"].tolist() == [[False] * 3, [True] * 3]
    assert layer.bias[0] == 0.0


def test_the_decay_of_the_authors_takes_longer():
    count = next(n for n, v in enumerate(_statistics([-1] * 200, 0.99)[0], 1) if v > 0.5)
    assert count == 16
    layer = nn.Linear(3, 1)
    with Smallify(decay=0.99).attach(layer) as attachment:
        gate = attachment.learned["smallify_gate"]
        for step in range(1, count + 1):
            assert bool(gate != 0)
            with torch.no_grad():
                gate.fill_(-0.1)
            attachment.after_step(Progress(step, 100, 1))
        assert bool(gate == 0)


def test_gates_start_uniform_above_zero_up_to_one():
    with Smallify(granularity="weight").attach(nn.Linear(100, 100)) as attachment:
        start = attachment.learned["smallify_gate"].detach().numpy().ravel()
    assert 0 < start.min() < start.max() <= 1
    # Distance of the empirical distribution from the uniform one: above 1.95 / sqrt(n) once in a thousand samples.
    assert np.abs(np.sort(start) - (np.arange(start.size) + 0.5) / start.size).max() < 1.95 / np.sqrt(start.size)


@pytest.mark.parametrize("granularity", ["unit", "weight"])
def test_penalty_forward_scores_and_folding_of_a_linear_layer(granularity):
    generator = np.random.default_rng(0)
    layer = nn.Linear(3, 4).double()
    weight, bias, x = generator.normal(size=(4, 3)), generator.normal(size=4), generator.normal(size=(5, 3))
    gate = generator.normal(size=4 if granularity == "unit" else (4, 3))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    attachment = Smallify(granularity=granularity, factor=0.01).attach(layer, seed=3)
    with torch.no_grad():
        attachment.learned["smallify_gate"].copy_(torch.tensor(gate))
    np.testing.assert_allclose(attachment.penalty().item(), 0.01 * np.abs(gate).sum(), rtol=1e-12)
    expected = np.abs(gate) if granularity == "unit" else np.abs(gate * weight)
    np.testing.assert_allclose(attachment.scores()["weight"], expected, rtol=1e-12)
    unit = granularity == "unit"
    output = (x @ weight.T + bias) * gate if unit else x @ (weight * gate).T + bias
    np.testing.assert_allclose(layer(torch.tensor(x)).detach(), output, rtol=1e-12)
    np.testing.assert_allclose(layer.eval()(torch.tensor(x)).detach(), output, rtol=1e-12)
    assert bool(attachment.finalize()["weight"].all())
    np.testing.assert_allclose(layer(torch.tensor(x)).detach(), output, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(layer.bias.detach(), bias * gate if unit else bias, rtol=1e-12)
