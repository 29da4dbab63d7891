"""Soft filter pruning against NumPy: the shares over a run, and which units are zeroed when."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.regularizers.soft_filter_pruning import SoftFilterPruning, asymptotic_share

# Share of the final sparsity at e / E, as printed in the source.
PRINTED = {0.0: 0.0, 1 / 16: 0.5, 1 / 8: 0.75, 1 / 4: 0.9375, 1 / 2: 0.99609, 1.0: 0.999985}


@pytest.mark.parametrize("t", PRINTED)
def test_asymptotic_shares(t):
    epochs = 200
    k = math.log(4) / (epochs / 8)
    share = 1 - math.exp(-k * t * epochs)
    assert share == pytest.approx(PRINTED[t], abs=5e-6)
    assert asymptotic_share(t) == pytest.approx(share, abs=1e-12)
    assert SoftFilterPruning(0.6, "constant").sparsity_at(t) == 0.6
    # The end of the run takes what was asked, so that floor(sparsity n) is not one short.
    expected = 0.6 if t == 1.0 else 0.6 * share
    assert SoftFilterPruning(0.6, "exponential").sparsity_at(t) == pytest.approx(expected, abs=1e-12)


def _zeroed(rows, share):
    """The indices of the floor(share n) rows of smallest L2 norm, lowest index first among equals."""
    count = min(math.floor(share * len(rows) + 1e-9), len(rows) - 1)
    return sorted(sorted(range(len(rows)), key=lambda i: (float(np.sqrt((rows[i] ** 2).sum())), i))[:count])


def _rows(weight, groups=None):
    """One row a unit; a transposed convolution `[in, out/g, k, k]` has unit j of group i at i * out/g + j."""
    w = weight.detach().numpy()
    if groups is None:
        return w.reshape(len(w), -1)
    per, out = w.shape[0] // groups, w.shape[1]
    return np.stack([w[i * per : (i + 1) * per, j].reshape(-1) for i in range(groups) for j in range(out)])


@pytest.mark.parametrize("schedule", ["constant", "exponential"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99])
def test_units_zeroed_after_every_epoch(schedule, sparsity):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 10, 3), nn.Conv2d(10, 8, 3, groups=2), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Linear(5, 7)
    )
    names = [f"{i}.weight" for i in range(4)]
    epochs, per_epoch = 8, 3
    with SoftFilterPruning(sparsity, schedule).attach(network) as attachment:
        for step in range(1, epochs * per_epoch + 1):
            # The next update: everything moves, so that pruned units are back.
            with torch.no_grad():
                for name in names:
                    network.get_parameter(name).normal_()
            before = {name: network.get_parameter(name).detach().clone() for name in names}
            attachment.after_step(Progress(step, epochs * per_epoch, per_epoch))
            epoch, within = divmod(step, per_epoch)
            share = 0.0 if within else sparsity
            if not within and schedule == "exponential" and epoch < epochs:
                share = sparsity * (1 - math.exp(-math.log(4) / (epochs / 8) * epoch))
            for name in names:
                groups = 2 if name == "2.weight" else None
                rows, after = _rows(before[name], groups), _rows(network.get_parameter(name), groups)
                gone = _zeroed(rows, share)
                expected = rows.copy()
                expected[gone] = 0.0
                np.testing.assert_array_equal(after, expected)
        masks = attachment.finalize()
    for name in names:
        groups = 2 if name == "2.weight" else None
        kept = _rows(masks[name], groups)
        assert kept.all(axis=1).sum() == len(kept) - min(math.floor(sparsity * len(kept) + 1e-9), len(kept) - 1)
        assert (_rows(network.get_parameter(name), groups)[~kept] == 0).all()


def test_ties_lose_the_lowest_index_and_one_unit_stays():
    layer = nn.Linear(2, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 1.0], [0.6, -0.8], [2.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))
    # Norms 1, 1, 2, 1, 1.
    masks = SoftFilterPruning(0.4).attach(layer).finalize()
    assert masks["weight"][:, 0].tolist() == [False, False, True, True, True]
    assert SoftFilterPruning(0.99).attach(layer).finalize()["weight"][:, 0].tolist() == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_attention_is_ranked_inside_every_head():
    attention = nn.MultiheadAttention(8, 2, bias=False)
    (target, *_) = find_targets(attention)
    with SoftFilterPruning(0.5).attach(attention) as attachment:
        weight = attention.in_proj_weight.detach().clone().numpy()
        masks = attachment.finalize()
    gone = [4 * block + i for block in range(6) for i in _zeroed(weight[4 * block : 4 * block + 4], 0.5)]
    assert np.flatnonzero(~masks[target.name].numpy().any(axis=1)).tolist() == gone
