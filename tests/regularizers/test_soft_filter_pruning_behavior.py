"""Soft filter pruning in a training loop: units grow again, runs resume, masks are what finalize has zeroed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.errors import UnknownNameError, UsageError
from secateur.regularizers.soft_filter_pruning import SoftFilterPruning
from secateur.testing.networks import STEPS, STEPS_PER_EPOCH, batches, run, run_steps, trainable
from secateur.testing.snapshots import structure


def _gone(network, name="conv1.weight"):
    return (network.get_parameter(name).flatten(1).norm(dim=1) == 0).tolist()


def test_zeroed_units_grow_again_within_the_epoch():
    network, data = trainable(), batches(trainable())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    with SoftFilterPruning(0.5).attach(network) as attachment:
        counts = []
        for step in range(5):
            run_steps(network, attachment, optimizer, data, range(step, step + 1))
            counts.append(sum(_gone(network, "head.weight")))
        assert counts == [0, 2, 0, 2, 0]


def test_a_run_equals_zeroing_by_hand():
    network, data, spec = trainable(), batches(trainable()), SoftFilterPruning(0.5, "exponential")
    twin = copy.deepcopy(network)
    found = run(network, spec, STEPS)
    targets = find_targets(twin)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for step in range(STEPS):
        run_steps(twin, None, optimizer, data, range(step, step + 1))
        if (step + 1) % STEPS_PER_EPOCH == 0:
            share = spec.sparsity_at((step + 1) / STEPS)
            for target in targets:
                weight = twin.get_parameter(target.name)
                norms = target.rows(weight.detach()).norm(dim=1)
                kept = torch.ones(target.units)
                kept[norms.argsort(stable=True)[: int(share * target.units + 1e-9)]] = 0.0
                with torch.no_grad():
                    weight.mul_(target.spread(kept))
    for name, tensor in twin.state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("at", [1, 2, 3, 7])
def test_resume_in_the_middle_and_at_the_end_of_an_epoch(at):
    spec, state = SoftFilterPruning(0.6, "exponential"), {}
    whole = run(trainable(), spec, STEPS)
    run(trainable(), spec, at, save=state)
    resumed = run(trainable(), spec, STEPS, load=state)
    assert all(torch.equal(resumed[n], t) for n, t in whole.items())


def test_the_end_of_a_run_that_is_no_whole_number_of_epochs():
    network = trainable()
    with SoftFilterPruning(0.5, "exponential").attach(network) as attachment:
        attachment.after_step(Progress(4, 5, 4))
        assert sum(_gone(network)) == 3
        attachment.after_step(Progress(5, 5, 4))
        assert sum(_gone(network)) == 4


def test_finalize_zeroes_and_returns_masks_and_leaves_nothing_behind():
    network = trainable()
    shape, biases = structure(network), network.conv1.bias.detach().clone()
    attachment = SoftFilterPruning(0.5).attach(network, find_targets(network, exclude=["@last"]))
    scores = attachment.scores()
    masks = attachment.finalize()
    assert structure(network) == shape
    assert list(masks) == [t.name for t in find_targets(network, exclude=["@last"])]
    for name, mask in masks.items():
        assert torch.equal(network.get_parameter(name) != 0, mask)
    assert masks["conv1.weight"].shape == network.conv1.weight.shape
    # The four lowest scores are gone.
    kept = masks["conv1.weight"].flatten(1).any(1)
    assert int(kept.sum()) == 4
    assert float(scores["conv1.weight"][~kept].max()) <= float(scores["conv1.weight"][kept].min())
    assert torch.equal(network.conv1.bias, biases)


def test_remove_zeroes_nothing():
    network = trainable()
    with SoftFilterPruning(0.5).attach(network):
        pass
    assert not any(_gone(network))


def test_frozen_targets_are_left_alone():
    network = trainable()
    network.conv1.weight.requires_grad_(False)
    attachment = SoftFilterPruning(0.5).attach(network)
    attachment.after_step(Progress(1, 2, 1))
    assert not any(_gone(network))
    assert "conv1.weight" not in attachment.finalize()


def test_half_precision_weights_are_ranked_in_single_precision():
    layer = nn.Linear(4, 3, bias=False).bfloat16()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0, 0.0625, 0.0], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.125, 0.0]]))
    masks = SoftFilterPruning(0.4).attach(layer).finalize()
    assert masks["weight"].any(1).tolist() == [True, False, True]


def test_a_network_cut_while_attached_is_an_error():
    network = trainable()
    with SoftFilterPruning().attach(network) as attachment:
        network.head = nn.Linear(6, 4)
        with pytest.raises(UsageError, match="was replaced while attached"):
            attachment.after_step(Progress(1, 1, 1))


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_impossible_sparsities_are_refused(sparsity):
    with pytest.raises(UsageError, match="sparsity is a share"):
        SoftFilterPruning(sparsity)


def test_unknown_schedules_are_refused():
    with pytest.raises(UnknownNameError, match="exponential"):
        SoftFilterPruning(schedule="cubic")
