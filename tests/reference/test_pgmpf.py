"""PGMPF against NumPy: its three schedules, the gradient mask, and what shrinks when."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.duration import Progress
from secateur.regularizers.pgmpf import PGMPF

EPOCHS = 100


def _blocked(e, pretrained=False):
    return 1.0 if e >= (0.8 if pretrained else 0.9) * EPOCHS else 1 - (1 - (e + 1) / EPOCHS) ** 3


def _shrink(e, sigma):
    a = -math.log(sigma / (1 + 0.01 * sigma)) / EPOCHS
    return 0.0 if e >= 0.8 * EPOCHS else math.exp(-a * e)


def _share(e, sparsity):
    return sparsity if e >= 0.9 * EPOCHS else sparsity * (1 - math.exp(-math.log(4) / (EPOCHS / 8) * e))


def test_printed_number():
    assert _blocked(49) == pytest.approx(0.875, abs=1e-15)
    assert PGMPF().blocked_at(49, 100) == 0.875


@pytest.mark.parametrize("pretrained", [False, True])
def test_schedules(pretrained):
    sigma = 1e-5 if pretrained else 1e-3
    spec = PGMPF(0.7, sigma=1e-5, block_from=0.8) if pretrained else PGMPF(0.7)
    for e in range(EPOCHS):
        assert spec.blocked_at(e, EPOCHS) == pytest.approx(_blocked(e, pretrained), abs=1e-12)
        assert spec.shrink_at(e, EPOCHS) == pytest.approx(_shrink(e, sigma), rel=1e-12)
        assert spec.sparsity_at(e, EPOCHS) == pytest.approx(_share(e, 0.7), abs=1e-12)
    # The edges: mu is 1 at first and about sigma ** 0.79 just before 0; the first pruning removes nothing.
    assert spec.shrink_at(0, EPOCHS) == 1.0
    assert spec.shrink_at(79, EPOCHS) == pytest.approx(sigma**0.79, rel=0.01)
    assert [spec.shrink_at(e, EPOCHS) for e in (80, 99)] == [0.0, 0.0]
    assert spec.sparsity_at(0, EPOCHS) == 0.0
    assert spec.sparsity_at(89, EPOCHS) < spec.sparsity_at(90, EPOCHS) == 0.7
    assert spec.blocked_at(79, EPOCHS) < 1.0
    assert (spec.blocked_at(80, EPOCHS) == 1.0) == pretrained
    assert spec.blocked_at(90, EPOCHS) == 1.0


@pytest.mark.parametrize("epochs", [1, 4, 10, 37])
def test_runs_of_any_length(epochs):
    for e in range(epochs):
        assert 0.0 < PGMPF().blocked_at(e, epochs) <= 1.0
        assert PGMPF().shrink_at(e, epochs) == pytest.approx(
            0.0 if e >= 0.8 * epochs else (1e-3 / (1 + 1e-5)) ** (e / epochs)
        )
        assert PGMPF().sparsity_at(e, epochs) == pytest.approx(
            0.5 * (1.0 if e >= 0.9 * epochs else 1 - math.exp(-8 * math.log(4) * e / epochs))
        )


def test_a_whole_run():
    """Weights from outside, gradients of ones: the shrinking, the mask, and the coins it has to be made of."""
    rng = np.random.default_rng(0)
    units, epochs, per_epoch, sparsity = 10, 10, 3, 0.6
    layer = nn.Linear(4, units).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rng.normal(size=(units, 4))))
        layer.bias.copy_(torch.tensor(rng.normal(size=units)))
    weight, bias = layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()
    pruned, seen = np.zeros(units, bool), set()
    a = -math.log(1e-3 / (1 + 1e-5)) / epochs
    with PGMPF(sparsity).attach(layer, seed=5) as attachment:
        for step in range(1, epochs * per_epoch + 1):
            running = (step - 1) // per_epoch
            layer.zero_grad()
            layer(torch.ones(1, 4, dtype=torch.double)).sum().backward()
            passed = 0.0
            if running:
                e = running - 1
                passed = 0.0 if e >= 0.9 * epochs else (1 - (e + 1) / epochs) ** 3
            gradient = layer.weight.grad.numpy()
            np.testing.assert_array_equal(gradient[~pruned], 1.0)
            for row in gradient[pruned]:
                assert row[0] == pytest.approx(0.0, abs=1e-12) or row[0] == pytest.approx(passed)
                assert (row == row[0]).all()
                seen.add(row[0] > 0)
            np.testing.assert_array_equal(layer.bias.grad.numpy(), 1.0)
            attachment.after_step(Progress(step, epochs * per_epoch, per_epoch))
            if step % per_epoch == 0:
                e = step // per_epoch - 1
                share = sparsity if e >= 0.9 * epochs else sparsity * (1 - math.exp(-8 * math.log(4) * e / epochs))
                order = np.argsort(np.sqrt((weight**2).sum(1)), kind="stable")
                pruned = np.zeros(units, bool)
                pruned[order[: math.floor(share * units + 1e-9)]] = True
                mu = 0.0 if e >= 0.8 * epochs else math.exp(-a * e)
                weight[pruned] *= mu
                bias[pruned] *= mu
            np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-12, atol=0)
            np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=1e-12, atol=0)
        assert seen == {True, False}
        masks = attachment.finalize()
    assert pruned.sum() == 6
    np.testing.assert_array_equal(masks["weight"].numpy(), np.repeat(~pruned[:, None], 4, 1))
