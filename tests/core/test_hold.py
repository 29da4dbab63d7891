"""Zeros that stay zero while training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from secateur.core.masks import Masks
from secateur.core.targets import find_targets
from secateur.criteria.magnitude import Magnitude
from secateur.errors import NoEffectError, UsageError
from secateur.sparsify.ranking import rank

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=1e-1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}


def _network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 3),
    )


def _data(n=8):
    torch.manual_seed(1)
    return torch.randn(n, 1, 3, 3), torch.arange(n) % 3


def _train(network, optimizer, steps, ema=None, clip=1.0):
    x, y = _data()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        if ema is not None:
            ema.update_parameters(network)


def _zeros(network, masks):
    return all(bool((network.get_parameter(n)[~m] == 0).all()) for n, m in masks.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_never_come_back_in_200_steps(name):
    network = _network()
    start = copy.deepcopy(network)
    masks = rank(network, Magnitude()).masks(0.8)
    optimizer = OPTIMIZERS[name](network.parameters())
    # Momentum from before the masks would revive pruned weights without the hold.
    _train(network, optimizer, 5)
    ema = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ema.update_parameters(network)
    with masks.hold(network, optimizer, ema):
        assert _zeros(network, masks)
        for _ in range(200):
            _train(network, optimizer, 1, ema)
            assert _zeros(network, masks)
            assert _zeros(ema.module, masks)
    assert all(bool(p.isfinite().all()) for p in network.parameters())
    for name_, mask in masks.items():
        assert not torch.equal(network.get_parameter(name_)[mask], start.get_parameter(name_)[mask])
    plain = _network(seed=5)
    plain.load_state_dict(network.state_dict(), strict=True)
    assert _zeros(plain, masks)
    x, _ = _data()
    assert torch.equal(plain.eval()(x), network.eval()(x))


def test_without_the_hold_they_do_come_back():
    network = _network()
    masks = rank(network, Magnitude()).masks(0.8)
    optimizer = OPTIMIZERS["adam"](network.parameters())
    masks.apply_(network)
    _train(network, optimizer, 1)
    assert not _zeros(network, masks)


def test_after_removal_nothing_is_held_and_nothing_is_left():
    network = _network()
    masks = rank(network, Magnitude()).masks(0.5)
    optimizer = OPTIMIZERS["sgd"](network.parameters())
    keys, hooks = list(network.state_dict()), len(optimizer._optimizer_step_post_hooks)
    hold = masks.hold(network, optimizer)
    assert list(network.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    hold.remove()
    hold.remove()
    assert len(optimizer._optimizer_step_post_hooks) == hooks
    assert _zeros(network, masks)
    _train(network, optimizer, 1)
    assert not _zeros(network, masks)


def test_an_exception_removes_the_hold():
    network = _network()
    optimizer = OPTIMIZERS["sgd"](network.parameters())

    def interrupted():
        with rank(network, Magnitude()).masks(0.5).hold(network, optimizer):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("name", ["sgd", "adam", "amsgrad", "rmsprop", "adagrad", "adamax", "nadam"])
def test_regrown_weights_get_clean_optimizer_state(name):
    network = _network()
    ranking = rank(network, Magnitude())
    sparse, dense = ranking.masks(0.8), ranking.masks(0.3)
    optimizer = OPTIMIZERS[name](network.parameters())
    with sparse.hold(network, optimizer) as hold:
        _train(network, optimizer, 10)
        before = copy.deepcopy(optimizer.state)
        hold.update_(dense)
        checked = 0
        for key, mask in dense.items():
            parameter = network.get_parameter(key)
            regrown = mask & ~sparse[key]
            assert bool(regrown.any())
            for entry, value in optimizer.state[parameter].items():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    old = next(s for p, s in before.items() if p.shape == parameter.shape)[entry]
                    assert bool((value[regrown] == 0).all()), entry
                    assert torch.equal(value[~regrown], old[~regrown]), entry
                    checked += 1
        assert checked >= 3
        assert hold.masks is dense
        _train(network, optimizer, 3)
        assert _zeros(network, dense)
        grown = network.get_parameter("6.weight")[dense["6.weight"] & ~sparse["6.weight"]]
        assert bool((grown != 0).any())
        # Fewer tensors held: the rest is free, with clean state.
        hold.update_(Masks({"0.weight": sparse["0.weight"]}))
        assert _zeros(network, {"0.weight": sparse["0.weight"]})
        freed = optimizer.state[network.get_parameter("6.weight")]
        gone = ~dense["6.weight"]
        assert all(bool((v[gone] == 0).all()) for v in freed.values() if torch.is_tensor(v) and v.shape == gone.shape)


def test_the_wrong_optimizer_is_refused():
    network, other = _network(), _network()
    masks = rank(network, Magnitude()).masks(0.5)
    with pytest.raises(UsageError, match="the optimizer trains none of the masked parameters"):
        masks.hold(network, OPTIMIZERS["sgd"](other.parameters()))
    with pytest.raises(NoEffectError, match="empty"):
        Masks({}).hold(network, OPTIMIZERS["sgd"](network.parameters()))
    optimizer = OPTIMIZERS["sgd"](network.parameters())
    with pytest.raises(UsageError, match="does not fit"):
        Masks({"6.weight": torch.ones(2, 2, dtype=torch.bool)}).hold(network, optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_frozen_layers_may_be_among_the_masked():
    network = _network()
    network[0].weight.requires_grad_(False)
    masks = rank(network, Magnitude()).masks(0.5)
    optimizer = OPTIMIZERS["adam"]([p for p in network.parameters() if p.requires_grad])
    with masks.hold(network, optimizer):
        _train(network, optimizer, 5)
        assert _zeros(network, masks)


def test_the_hold_meets_the_regularizers():
    from secateur.core.duration import Progress
    from secateur.regularizers.targeted_dropout import TargetedDropout

    network = _network()
    masks = rank(network, Magnitude()).masks(0.5)
    optimizer = OPTIMIZERS["sgd"](network.parameters())
    with masks.hold(network, optimizer), TargetedDropout(gamma=0.8, alpha=0.5).attach(network) as attachment:
        for step in range(20):
            _train(network, optimizer, 1)
            attachment.after_step(Progress(step + 1, 20, 10))
            assert _zeros(network, masks)
    kept = find_targets(network).tensors(network)
    for name, mask in masks.items():
        assert bool((kept[name][mask] != 0).all()), "dropout noise was left in the weights"
