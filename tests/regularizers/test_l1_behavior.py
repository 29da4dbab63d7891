"""The L1 penalty: gradients, frozen and half-precision weights, large tensors, refused settings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.core.targets import find_targets
from secateur.errors import UnknownNameError, UsageError
from secateur.regularizers.l1 import L1
from secateur.testing.networks import trainable


@pytest.mark.parametrize("reduction", ["sum", "mean_per_tensor"])
def test_gradient_against_finite_differences(reduction):
    network, epsilon = trainable().double(), 1e-6
    with L1(0.3, reduction).attach(network) as attachment:
        attachment.penalty().backward()
        for target in attachment.targets:
            weight = attachment.parameters[target.name]
            for index in (0, weight.numel() // 2, weight.numel() - 1):
                flat = weight.detach().view(-1)
                old = float(flat[index])
                # Away from the kink at zero.
                assert abs(old) > 10 * epsilon
                values = []
                for step in (epsilon, -epsilon):
                    flat[index] = old + step
                    values.append(float(attachment.penalty().detach()))
                flat[index] = old
                slope = (values[0] - values[1]) / (2 * epsilon)
                assert float(weight.grad.view(-1)[index]) == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_the_subgradient_at_zero_is_zero_and_the_factor_scales():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, -2.0, 3.0], [1.0, 0.0, 0.0]]))
    with L1(0.5).attach(layer) as attachment:
        attachment.penalty().backward()
    assert layer.weight.grad.tolist() == [[0.0, -0.5, 0.5], [0.5, 0.0, 0.0]]


def test_no_factor_no_penalty_and_frozen_weights_get_no_gradient():
    network = trainable()
    with L1(0.0).attach(network) as attachment:
        assert attachment.penalty() == 0.0
    network.conv1.weight.requires_grad_(False)
    with L1(1.0).attach(network) as attachment:
        attachment.penalty().backward()
    assert network.conv1.weight.grad is None
    assert network.head.weight.grad is not None
    assert network.norm1.weight.grad is None


def test_millions_of_single_precision_terms_add_up():
    layer = nn.Linear(4000, 2500, bias=False)
    with L1(1.0).attach(layer) as attachment:
        got = float(attachment.penalty().detach())
    assert got == pytest.approx(float(layer.weight.detach().double().abs().sum()), rel=1e-5)


def test_on_norms_it_is_the_penalty_of_network_slimming():
    network = trainable()
    targets = find_targets(network, kind="norm")
    with L1(1e-4).attach(network, targets) as attachment:
        expected = 1e-4 * sum(float(network.get_parameter(t.name).detach().abs().sum()) for t in targets)
        assert float(attachment.penalty().detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("factor", [-1e-4, float("inf"), float("nan")])
def test_impossible_factors_are_refused(factor):
    with pytest.raises(UsageError, match="factor is at least 0"):
        L1(factor)


def test_unknown_reductions_are_refused():
    with pytest.raises(UnknownNameError, match="mean_per_tensor"):
        L1(reduction="mean")


def test_a_network_cut_while_attached_is_an_error():
    network = trainable()
    with L1().attach(network) as attachment:
        network.head = nn.Linear(6, 4)
        with pytest.raises(UsageError, match="was replaced while attached"):
            attachment.penalty()
