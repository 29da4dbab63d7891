"""PGMPF in a training loop: its coins, one draw a step, resuming, and what finalize leaves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.errors import CheckpointError, NoEffectError, UsageError
from secateur.regularizers.pgmpf import PGMPF
from secateur.testing.networks import STEPS, batches, dense, run, trainable
from secateur.testing.snapshots import gradients, structure


def _after_epochs(network, spec, epochs=2, of=4, seed=1):
    """Attached, `epochs` of `of` epochs of one step each done, without an update."""
    attachment = spec.attach(network, seed=seed)
    for epoch in range(epochs):
        network(batches(network)[0][0])
        attachment.after_step(Progress(epoch + 1, of, 1))
    network.zero_grad()
    return attachment


def _backward(network, batch):
    F.cross_entropy(network(batch[0]), batch[1]).backward()


def test_coins_are_fair_and_independent_over_units_and_steps():
    layer = nn.Linear(1, 40)
    steps = 400
    with PGMPF(0.5).attach(layer, seed=3) as attachment:
        draws = []
        for step in range(steps):
            layer.zero_grad()
            layer(torch.ones(1, 1)).sum().backward()
            if step:
                draws.append(layer.weight.grad[:, 0].clone())
            # Always the same place of a long run: two of eight epochs are over.
            attachment.after_step(Progress(2, 8, 1))
    kept = attachment._kept["weight"]
    assert int((~kept).sum()) == math.floor(0.5 * (1 - 4**-1) * 40 + 1e-9)
    found = torch.stack(draws)
    assert bool((found[:, kept] == 1).all())
    passed = 1 - PGMPF().blocked_at(1, 8)
    coins = (found[:, ~kept] > 0).double()
    torch.testing.assert_close(found[:, ~kept].max(), torch.tensor(passed))
    # Mean 1/2 with standard error 1 / (2 sqrt n); pairs of neighbors agree as independent coins do.
    assert abs(float(coins.mean()) - 0.5) < 4 * 0.5 / math.sqrt(coins.numel())
    for agree in (coins[1:] == coins[:-1], coins[:, 1:] == coins[:, :-1]):
        assert abs(float(agree.double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(agree.numel())


def test_the_first_epoch_is_plain():
    network, batch = trainable(), batches(trainable())[0]
    twin = copy.deepcopy(network)
    _backward(twin, batch)
    with PGMPF(0.9).attach(network):
        _backward(network, batch)
    assert all(torch.equal(g, gradients(twin)[n]) for n, g in gradients(network).items())


def test_all_backward_passes_of_a_step_share_one_draw_also_around_an_evaluation():
    network, batch = trainable(), batches(trainable())[0]
    with _after_epochs(network, PGMPF(0.9)) as attachment:
        network(batch[0])
        drawn = {n: t.clone() for n, t in attachment._passing.items()}
        assert any(bool((t < 1).any()) for t in drawn.values())
        with torch.no_grad():
            network.eval()(batch[0])
        network.train()(batch[0])
        assert all(torch.equal(t, drawn[n]) for n, t in attachment._passing.items())
        attachment.after_step(Progress(3, 4, 1))
        network(batch[0])
        assert any(not torch.equal(t, drawn[n]) for n, t in attachment._passing.items())


def test_gradients_in_eval_mode_are_plain():
    network, batch = trainable(), batches(trainable())[0]
    with _after_epochs(network, PGMPF(0.9)):
        network(batch[0])
        twin = copy.deepcopy(network).eval()
        _backward(twin, batch)
        _backward(network.eval(), batch)
        assert all(torch.equal(g, gradients(twin)[n]) for n, g in gradients(network).items())


def test_only_weights_of_targets_are_masked():
    network, batch = trainable(), batches(trainable())[0]
    targets = find_targets(network, include=["conv1", "up"])
    attachment = PGMPF(0.9, block_from=0.0).attach(network, targets, seed=1)
    for epoch in range(2):
        network(batch[0])
        attachment.after_step(Progress(epoch + 1, 4, 1))
    network.zero_grad()
    twin = copy.deepcopy(network)
    _backward(network, batch)
    _backward(twin, batch)
    plain, kept = gradients(twin), attachment._kept
    for name, gradient in gradients(network).items():
        expected = plain[name]
        if name in kept:
            assert 0 < int(kept[name].sum()) < len(kept[name])
            expected = expected * targets[name].spread(kept[name].float())
        torch.testing.assert_close(gradient, expected, msg=lambda m, name=name: f"{name}: {m}")
    attachment.remove()


@pytest.mark.parametrize("at", [3, 4, 5, 7])
def test_resume(at):
    spec, state = PGMPF(0.6), {}
    whole = run(trainable(), spec, STEPS, seed=1)
    run(trainable(), spec, at, seed=1, save=state)
    resumed = run(trainable(), spec, STEPS, seed=9, load=state)
    assert all(torch.equal(resumed[n], t) for n, t in whole.items())


def test_state_of_another_network_is_refused():
    network, other = trainable(), dense().train()
    with PGMPF().attach(network) as attachment, PGMPF().attach(other) as another:
        with pytest.raises(CheckpointError, match="saved state has keys"):
            another.load_state_dict(attachment.state_dict())
        state = attachment.state_dict()
        state["kept.head.weight"] = torch.ones(3, dtype=torch.bool)
        with pytest.raises(CheckpointError, match=r"head.weight.*3 units.*expected 4"):
            attachment.load_state_dict(state)


def test_finalize_zeroes_weights_and_biases_and_leaves_nothing_behind():
    network = trainable()
    shape = structure(network)
    attachment = _after_epochs(network, PGMPF(0.5), epochs=3)
    masks = attachment.finalize()
    assert structure(network) == shape
    for target in find_targets(network):
        weight = network.get_parameter(target.name)
        assert torch.equal(weight != 0, masks[target.name]), target.name
        kept = target.rows(masks[target.name]).all(dim=1)
        assert int(kept.sum()) == target.units - target.units // 2
        if target.bias is not None:
            assert torch.equal(network.get_parameter(target.bias) != 0, kept)


def test_frozen_weights_and_biases_are_left_alone():
    network = trainable()
    network.conv1.weight.requires_grad_(False)
    network.up.bias.requires_grad_(False)
    before = network.conv1.weight.detach().clone(), network.up.bias.detach().clone()
    masks = _after_epochs(network, PGMPF(0.9)).finalize()
    assert torch.equal(network.conv1.weight, before[0])
    assert torch.equal(network.up.bias, before[1])
    assert "conv1.weight" not in masks
    assert "up.weight" in masks


def test_a_cut_off_last_epoch_counts():
    network = trainable()
    with PGMPF(0.5, sigma=1e-3).attach(network) as attachment:
        for step in range(1, 6):
            network(batches(network)[0][0])
            attachment.after_step(Progress(step, 5, 2))
        # Epochs 0, 1 and half of 2, of three.
        assert attachment._epoch() == (2, 3)
        assert int((~attachment._kept["conv1.weight"]).sum()) == math.floor(8 * 0.5 * (1 - 4 ** (-16 / 3)))


def test_a_step_without_a_training_forward_pass_is_an_error():
    with PGMPF().attach(trainable()) as attachment, pytest.raises(NoEffectError, match="no training forward pass"):
        attachment.after_step(Progress(1, 4, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, "sparsity is a share"),
        ({"sparsity": -0.1}, "sparsity is a share"),
        ({"sigma": 0.0}, "sigma lies in"),
        ({"sigma": 1.0}, "sigma lies in"),
        ({"block_from": 1.1}, "block_from is a share"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        PGMPF(**settings)


def test_the_batch_norm_behind_a_pruned_unit_goes_with_it():
    """A BatchNorm undoes a scale in front of it, so that shrinking the weights alone would change nothing."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)
    )
    with torch.no_grad():
        network[1].weight.normal_()
        network[1].bias.normal_()
    before = network[1].weight.detach().clone()
    attachment = PGMPF(0.5).attach(network, find_targets(network, exclude=["@last"]))
    for step in (1, 2):
        network(torch.randn(4, 3, 5, 5)).sum().backward()
        attachment.after_step(Progress(step, 10, 1))
    shrunk = (network[1].weight.detach() / before).tolist()
    factor = PGMPF(0.5).shrink_at(1, 10)
    assert {round(value / factor, 4) for value in shrunk} == {1.0, round(1 / factor, 4)}
    masks = attachment.finalize()
    gone = ~masks["0.weight"].flatten(1).any(1)
    assert int(gone.sum()) == 4
    assert bool((network[1].weight[gone] == 0).all())
    assert bool((network[1].bias[gone] == 0).all())
    assert bool((network[1].weight[~gone] != 0).all())
    out = network.eval()[:3](torch.randn(2, 3, 5, 5))
    assert bool((out[:, gone] == 0).all())
