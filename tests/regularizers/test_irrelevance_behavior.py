"""Irrelevance regularization: which backward passes it acts in, and what it leaves behind."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.errors import NoEffectError, UsageError
from secateur.regularizers.irrelevance import Irrelevance
from secateur.testing.networks import batches, trainable
from secateur.testing.snapshots import gradients, structure

FACTOR = 0.3


def _plain(network, batch):
    network.zero_grad()
    loss = F.cross_entropy(network(batch[0]), batch[1])
    loss.backward()
    return gradients(network)


def _expected(network, plain):
    names = find_targets(network).names
    found = dict(plain)
    for name in names:
        weight = network.get_parameter(name).detach()
        found[name] = plain[name] + 2 * FACTOR * (-plain[name].abs()).exp() * weight
    return found


def _close(network, expected):
    for name, gradient in gradients(network).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, name=name: f"{name}: {m}")


def test_every_target_and_nothing_else_gets_the_term():
    network, batch = trainable().double(), batches(trainable())[0]
    batch = (batch[0].double(), batch[1])
    expected = _expected(network, _plain(copy.deepcopy(network), batch))
    with Irrelevance(FACTOR).attach(network) as attachment:
        (F.cross_entropy(network(batch[0]), batch[1]) + attachment.penalty()).backward()
        _close(network, expected)


def test_shared_layers_see_the_gradient_of_all_their_uses():
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(5, 5)

        def forward(self, x):
            for _ in range(3):
                x = torch.tanh(self.cell(x))
            return x

    network, x = Thrice().double(), torch.randn(4, 5, dtype=torch.double)
    twin = copy.deepcopy(network)
    twin(x).square().sum().backward()
    g, w = twin.cell.weight.grad, twin.cell.weight.detach()
    with Irrelevance(FACTOR).attach(network) as attachment:
        (network(x).square().sum() + attachment.penalty()).backward()
    torch.testing.assert_close(network.cell.weight.grad, g + 2 * FACTOR * (-g.abs()).exp() * w)


def test_a_backward_pass_without_the_penalty_is_plain():
    network, batch = trainable(), batches(trainable())[0]
    plain = _plain(copy.deepcopy(network), batch)
    with Irrelevance(FACTOR).attach(network) as attachment:
        assert all(torch.equal(g, plain[n]) for n, g in _plain(copy.deepcopy(network), batch).items())
        names = find_targets(network).names
        loss = F.cross_entropy(network(batch[0]), batch[1])
        found = torch.autograd.grad(loss, [network.get_parameter(n) for n in names])
        for name, gradient in zip(names, found, strict=True):
            torch.testing.assert_close(gradient, plain[name])
        # And one with it leaves nothing for the next.
        (F.cross_entropy(network(batch[0]), batch[1]) + attachment.penalty()).backward()
        network.zero_grad()
        F.cross_entropy(network(batch[0]), batch[1]).backward()
        _close(network, plain)


def test_parts_of_an_accumulated_batch_count_by_their_share():
    network, data = trainable().double(), [(x.double(), y) for x, y in batches(trainable())[:2]]
    parts = [_expected(network, _plain(copy.deepcopy(network), batch)) for batch in data]
    with Irrelevance(FACTOR).attach(network) as attachment:
        for batch in data:
            ((F.cross_entropy(network(batch[0]), batch[1]) + attachment.penalty()) / 2).backward()
        _close(network, {n: (parts[0][n] + parts[1][n]) / 2 for n in parts[0]})


def test_a_penalty_times_zero_and_a_factor_of_zero_are_no_term():
    network, batch = trainable(), batches(trainable())[0]
    plain = _plain(copy.deepcopy(network), batch)
    for factor, times in ((FACTOR, 0.0), (0.0, 1.0)):
        network.zero_grad()
        with Irrelevance(factor).attach(network) as attachment:
            (F.cross_entropy(network(batch[0]), batch[1]) + times * attachment.penalty()).backward()
        _close(network, plain)


def test_layers_that_the_loss_does_not_reach_stay_without_a_gradient():
    network = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
    with Irrelevance(FACTOR).attach(network) as attachment:
        (network["used"](torch.ones(2, 3)).sum() + attachment.penalty()).backward()
        assert network["unused"].weight.grad is None
        network["unused"](torch.ones(2, 3)).sum().backward()
        assert network["unused"].weight.grad.tolist() == [[2.0] * 3] * 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return checkpoint(self.second, self.first(x), use_reentrant=reentrant)

    network, x = Checkpointed(), torch.randn(3, 4)
    twin = copy.deepcopy(network)
    twin.second(twin.first(x)).square().sum().backward()
    with Irrelevance(FACTOR).attach(network) as attachment:
        (network(x).square().sum() + attachment.penalty()).backward()
    for layer, other in ((network.first, twin.first), (network.second, twin.second)):
        g = other.weight.grad
        torch.testing.assert_close(layer.weight.grad, g + 2 * FACTOR * (-g.abs()).exp() * other.weight.detach())


def test_thawed_parameters_are_regularized_from_then_on():
    network, batch = trainable(), batches(trainable())[0]
    network.head.weight.requires_grad_(False)
    with Irrelevance(FACTOR).attach(network) as attachment:
        (F.cross_entropy(network(batch[0]), batch[1]) + attachment.penalty()).backward()
        assert network.head.weight.grad is None
        network.head.weight.requires_grad_(True)
        network.load_state_dict(trainable().state_dict())
        expected = _expected(network, _plain(copy.deepcopy(network), batch))
        network.zero_grad()
        (F.cross_entropy(network(batch[0]), batch[1]) + attachment.penalty()).backward()
        _close(network, expected)


def test_forgetting_the_penalty_is_an_error():
    network, batch = trainable(), batches(trainable())[0]
    with Irrelevance().attach(network) as attachment:
        F.cross_entropy(network(batch[0]), batch[1]).backward()
        with pytest.raises(NoEffectError, match=r"add penalty\(\) to the loss"):
            attachment.after_step(Progress(1, 4, 2))
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    with Irrelevance().attach(network) as attachment:
        assert attachment.penalty() == 0.0
        attachment.after_step(Progress(1, 4, 2))


def test_half_precision_gradients_keep_their_type():
    layer = nn.Linear(4, 3).bfloat16()
    with Irrelevance(FACTOR).attach(layer) as attachment:
        (layer(torch.ones(2, 4, dtype=torch.bfloat16)).sum() + attachment.penalty()).backward()
    assert layer.weight.grad.dtype == torch.bfloat16
    w = layer.weight.detach().float()
    torch.testing.assert_close(layer.weight.grad.float(), 2 + 2 * FACTOR * w * 0.1353353, rtol=0.02, atol=0.02)


def test_saved_and_copied_networks_have_no_hooks_and_removal_keeps_those_of_others():
    network = trainable()
    calls = []
    handle = network.head.weight.register_hook(lambda g: calls.append(1))
    shape = structure(network)
    attachment = Irrelevance().attach(network)
    assert all(p._backward_hooks is None for p in copy.deepcopy(network).parameters())
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    assert not any(p._backward_hooks for p in torch.load(file, weights_only=False).parameters())
    attachment.remove()
    assert structure(network) == shape
    network(batches(network)[0][0]).sum().backward()
    assert calls == [1]
    handle.remove()


@pytest.mark.parametrize("factor", [-1.0, float("inf"), float("nan")])
def test_impossible_factors_are_refused(factor):
    with pytest.raises(UsageError, match="factor is at least 0"):
        Irrelevance(factor)
