"""Network slimming: penalty and its gradient against NumPy and finite differences, the forward pass untouched."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.duration import Progress
from secateur.core.select import select
from secateur.core.targets import find_targets
from secateur.errors import NoEffectError, UsageError
from secateur.regularizers.ddrop import DDrop
from secateur.regularizers.network_slimming import NetworkSlimming


def _network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))
    for index in (1, 4):
        nn.init.normal_(network[index].weight)
    return network.train()


def test_the_penalty_is_l1_times_the_sum_of_all_scales():
    network = _network()
    gammas = [network[i].weight.detach().double().numpy() for i in (1, 4)]
    with NetworkSlimming(l1=0.125).attach(network) as attachment:
        assert float(attachment.penalty().detach()) == pytest.approx(0.125 * sum(np.abs(g).sum() for g in gammas))
        scores = attachment.scores()
        assert list(scores) == ["1.weight", "4.weight"]
        for score, gamma in zip(scores.values(), gammas, strict=True):
            np.testing.assert_allclose(score.numpy(), np.abs(gamma))
        attachment.after_step(Progress(1, 1, 1))
    assert NetworkSlimming().l1 == 1e-4


def test_the_gradient_against_finite_differences_and_zero_at_zero():
    network = _network().double()
    with torch.no_grad():
        network[1].weight[0] = 0.0
    with NetworkSlimming(l1=0.3).attach(network) as attachment:
        attachment.penalty().backward()
        gamma, h = network[1].weight, 1e-6
        numeric = []
        for i in range(4):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    gamma[i] += sign * h
                values.append(float(attachment.penalty().detach()))
                with torch.no_grad():
                    gamma[i] -= sign * h
            numeric.append((values[0] - values[1]) / (2 * h))
        np.testing.assert_allclose(gamma.grad.numpy(), numeric, atol=1e-6)
        assert gamma.grad[0] == 0.0
        assert network[0].weight.grad is None
        assert network[1].bias.grad is None


def test_it_is_the_subgradient_step_of_the_published_code():
    """Adding l1 x sign(gamma) to the gradient by hand gives the same step."""
    network = _network()
    twin = copy.deepcopy(network)
    x = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    plain = network(x).detach()
    with NetworkSlimming(l1=0.01).attach(network) as attachment:
        out = network(x)
        (out.square().mean() + attachment.penalty()).backward()
    twin(x)
    twin(x).square().mean().backward()
    torch.testing.assert_close(out.detach(), plain)
    for (name, p), (_, q) in zip(network.named_parameters(), twin.named_parameters(), strict=True):
        extra = 0.01 * q.detach().sign() if name in ("1.weight", "4.weight") else 0.0
        torch.testing.assert_close(p.grad, q.grad + extra)


def test_ddrop_that_keeps_everything_has_the_same_penalty():
    network = _network()
    x = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    found = []
    for spec in (NetworkSlimming(l1=0.02), DDrop(keep_min=1.0, keep_max=1.0, l1=0.02)):
        twin = copy.deepcopy(network)
        with spec.attach(twin) as attachment:
            (twin(x).square().mean() + attachment.penalty()).backward()
        found.append([p.grad for p in twin.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_half_of_the_channels_is_half_of_them():
    """The published threshold keeps what is strictly above the third of six, which is two; exactly half is three."""
    gamma = np.array([0.9, 0.1, 0.5, 0.4, 0.05, 0.7])
    threshold = np.sort(gamma)[int(len(gamma) * 0.5)]
    assert threshold == 0.5
    assert int((gamma > threshold).sum()) == 2
    kept = select({"g": torch.tensor(gamma)}, 0.5)["g"]
    assert kept.tolist() == [True, False, True, False, False, True]


def test_errors():
    with pytest.raises(UsageError, match="l1 is at least 0"):
        NetworkSlimming(l1=-1e-4)
    plain = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(NoEffectError, match="no prunable norm"):
        NetworkSlimming().attach(plain)
    network = _network()
    with pytest.raises(UsageError, match="not a BatchNorm scale"):
        NetworkSlimming().attach(network, find_targets(network))
    with NetworkSlimming(l1=0.0).attach(network) as attachment:
        assert attachment.penalty() == 0.0
