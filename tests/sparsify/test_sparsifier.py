"""The four calls in a loop of one's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import NoEffectError, UsageError
from secateur.regularizers.ddrop import DDrop
from secateur.regularizers.none import NoRegularizer
from secateur.regularizers.targeted_dropout import TargetedDropout
from secateur.sparsify.sparsifier import Sparsifier

STEPS = 6


def _network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.normal_(network[1].weight)
    return network.train()


def _loop(network, sparsifier, optimizer, steps):
    torch.manual_seed(1)
    x, y = torch.randn(10, 5), torch.arange(10) % 3
    for _ in range(steps):
        optimizer.zero_grad()
        (F.cross_entropy(network(x), y) + sparsifier.penalty()).backward()
        optimizer.step()
        sparsifier.after_step()


def _optimizer(network):
    return torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)


SPECS = [TargetedDropout(0.8, 0.7, ramp=True), DDrop(keep_min=0.2, schedule="linear"), NoRegularizer()]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_killed_and_resumed_run_ends_bitwise_the_same(spec):
    whole = _network()
    with Sparsifier(whole, spec, steps=STEPS, steps_per_epoch=2, seed=3) as sparsifier:
        _loop(whole, sparsifier, _optimizer(whole), STEPS)
        assert sparsifier.progress.fraction == 1.0

    first = _network()
    optimizer = _optimizer(first)
    with Sparsifier(first, spec, steps=STEPS, steps_per_epoch=2, seed=3) as sparsifier:
        _loop(first, sparsifier, optimizer, 2)
        saved = sparsifier.state_dict()
    second = _network()
    second.load_state_dict(first.state_dict())
    resumed = _optimizer(second)
    resumed.load_state_dict(optimizer.state_dict())
    with Sparsifier(second, spec, steps=STEPS, steps_per_epoch=2, seed=99) as sparsifier:
        sparsifier.load_state_dict(saved)
        assert sparsifier.progress.step == 2
        _loop(second, sparsifier, resumed, STEPS - 2)
    for (name, a), (_, b) in zip(whole.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_finalize_leaves_a_plain_network():
    network = _network()
    keys = list(network.state_dict())
    sparsifier = Sparsifier(network, TargetedDropout(), steps=STEPS).attach()
    _loop(network, sparsifier, _optimizer(network), 2)
    assert sparsifier.finalize() is None
    assert list(network.state_dict()) == keys
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())
    with pytest.raises(UsageError, match="not attached"):
        sparsifier.after_step()
    # And it can be attached again.
    sparsifier.attach()
    with pytest.raises(UsageError, match="already attached"):
        sparsifier.attach()
    sparsifier.finalize()


def test_an_exception_in_the_block_detaches():
    network = _network()
    sparsifier = Sparsifier(network, TargetedDropout(), steps=STEPS)
    before = network[0].weight.detach().clone()

    def interrupted():
        with sparsifier:
            network(torch.randn(4, 5))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert torch.equal(network[0].weight, before)
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_misuse_is_told_in_one_line():
    network = _network()
    with pytest.raises(UsageError, match="at least 1, got 0"):
        Sparsifier(network, TargetedDropout(), steps=0)
    with pytest.raises(UsageError, match="not attached"):
        Sparsifier(network, TargetedDropout(), steps=1).penalty()
    with Sparsifier(network.eval(), TargetedDropout(), steps=2) as sparsifier:
        network(torch.randn(4, 5))
        with pytest.raises(NoEffectError, match=r"train\(\) mode"):
            sparsifier.after_step()


def test_one_epoch_is_the_whole_run_unless_told():
    assert Sparsifier(_network(), NoRegularizer(), steps=7).progress.steps_per_epoch == 7
