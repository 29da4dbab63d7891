"""Masks of the pool against the text: nested, one per seed and layer, and equal to the network cut along them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.seeds import keyed_generator
from secateur.core.targets import find_targets
from secateur.regularizers.mask_pool import MaskPoolDropout, unit_mask
from secateur.surgery import cut_, make_plan, trace_groups

RATES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def _expected(seed, layer, units, rate, min_keep=1):
    """From the text, in NumPy: keep u >= p; if fewer than min_keep, those of highest u."""
    u = torch.rand(units, generator=keyed_generator(seed, "unit mask", layer), dtype=torch.float64).numpy()
    kept = u >= rate
    if kept.sum() < min_keep:
        kept = np.zeros(units, dtype=bool)
        kept[np.argsort(-u)[:min_keep]] = True
    return kept


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("seed", [8, 42])
def test_a4_masks_follow_the_text_and_repeat(seed, rate):
    for layer, units in (("conv1.weight", 64), ("conv2.weight", 128), ("fc1.weight", 3)):
        kept = unit_mask(seed, layer, units, rate)
        assert kept.dtype == torch.bool
        np.testing.assert_array_equal(kept.numpy(), _expected(seed, layer, units, rate))
        assert torch.equal(kept, unit_mask(seed, layer, units, rate))


def test_a4_masks_are_nested_in_the_rate():
    for low, high in itertools.pairwise(RATES):
        outer, inner = (unit_mask(8, "conv1.weight", 512, rate) for rate in (low, high))
        assert bool((outer | ~inner).all())


def test_layers_do_not_share_a_prefix_and_seeds_differ():
    narrow, wide = unit_mask(8, "conv1.weight", 64, 0.5), unit_mask(8, "conv2.weight", 128, 0.5)
    assert not torch.equal(narrow, wide[:64])
    assert not torch.equal(narrow, unit_mask(42, "conv1.weight", 64, 0.5))


def test_the_share_kept_is_one_minus_the_rate():
    for rate in (0.3, 0.5, 0.9):
        kept = unit_mask(0, "fc.weight", 100_000, rate).double().mean().item()
        assert abs(kept - (1 - rate)) < 5 * (rate * (1 - rate) / 100_000) ** 0.5


@pytest.mark.parametrize("min_keep", [1, 2, 5])
def test_min_keep(min_keep):
    # At a drop rate of .9 two units of four are all dropped two times in three.
    counts = [int(unit_mask(seed, "conv.weight", 4, 0.9, min_keep).sum()) for seed in range(50)]
    assert min(counts) == min(min_keep, 4)
    for seed in range(50):
        expected = _expected(seed, "conv.weight", 4, 0.9, min(min_keep, 4))
        np.testing.assert_array_equal(unit_mask(seed, "conv.weight", 4, 0.9, min_keep).numpy(), expected)


def test_global_generators_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    unit_mask(8, "conv1.weight", 64, 0.5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def _thesis_like():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12 * 4, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    )


def test_a3_rate_zero_is_the_identity():
    network, x = _thesis_like().train(), torch.randn(4, 3, 8, 8)
    plain = network(x)
    with MaskPoolDropout(drop_rate=0.0).attach(network):
        assert torch.equal(network(x), plain)


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.8])
def test_a2_the_network_cut_and_scaled_computes_the_training_forward_pass(rate):
    network, x = _thesis_like().train(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    targets = find_targets(network, exclude=["@last"])
    with MaskPoolDropout(drop_rate=rate).attach(network, targets, seed=3) as attachment:
        expected = network(x).detach()
        kept = {t.name: unit_mask(attachment.mask_seed, t.name, t.units, rate) for t in targets}
    # The factor 1 / (1 - p) of the surviving units goes into their weights and bias.
    with torch.no_grad():
        for target in targets:
            for name in (target.name, target.bias):
                network.get_parameter(name).div_(1 - rate)
    network.eval()
    groups = trace_groups(network, x[:1])
    cut_(network, make_plan(network, groups, {g.name: kept[g.name] for g in groups if g.name in kept}))
    assert [network[i].weight.shape[0] for i in (0, 3, 7)] == [int(k.sum()) for k in kept.values()]
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)


def test_a2_by_hand():
    """The same with slices written out: columns c HW to (c + 1) HW of the first dense layer go with channel c."""
    network, x = _thesis_like().train(), torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    targets = find_targets(network, exclude=["@last"])
    with MaskPoolDropout(drop_rate=0.5).attach(network, targets, seed=3) as attachment:
        expected = network(x).detach()
        first, second, dense = (
            unit_mask(attachment.mask_seed, t.name, t.units, 0.5).nonzero().flatten() for t in targets
        )
    w = [p.detach() for p in network.parameters()]
    columns = (second[:, None] * 4 + torch.arange(4)).flatten()
    h = nn.functional.conv2d(x, 2 * w[0][first], 2 * w[1][first], padding=1).relu()
    h = nn.functional.conv2d(
        nn.functional.max_pool2d(h, 2), 2 * w[2][second][:, first], 2 * w[3][second], padding=1
    ).relu()
    h = nn.functional.max_pool2d(h, 2).flatten(1)
    h = nn.functional.linear(h, 2 * w[4][dense][:, columns], 2 * w[5][dense]).relu()
    torch.testing.assert_close(nn.functional.linear(h, w[6][:, dense], w[7]), expected, rtol=1e-5, atol=1e-5)


def test_a2_with_batch_norm_the_factor_goes_into_its_scale_and_shift():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    ).train()
    nn.init.normal_(network[1].weight)
    nn.init.normal_(network[1].bias)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    targets = find_targets(network, exclude=["@last"])
    with MaskPoolDropout(drop_rate=0.4).attach(network, targets, seed=3) as attachment:
        expected = network(x).detach()
        kept = unit_mask(attachment.mask_seed, "0.weight", 8, 0.4)
    with torch.no_grad():
        network[1].weight.div_(0.6)
        network[1].bias.div_(0.6)
    cut_(network, make_plan(network, trace_groups(network.eval(), x[:1]), {"0.weight": kept}))
    # In training mode: each channel is normalized by itself, so that the cut changes nothing for the others.
    torch.testing.assert_close(network.train()(x), expected, rtol=1e-5, atol=1e-5)
