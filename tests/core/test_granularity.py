"""Pool and expand fit together for every granularity and layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.core.granularity import Block, NofM, Unit, Weight, parse_granularity, pool_cells
from secateur.core.targets import find_targets
from secateur.errors import UnknownNameError, UsageError


def _layer(kind, groups, ins, outs, kernel):
    if kind == "linear":
        return nn.Linear(groups * ins, groups * outs)
    family = nn.Conv2d if kind == "conv" else nn.ConvTranspose2d
    return family(groups * ins, groups * outs, kernel, groups=groups)


layers = st.builds(
    _layer,
    st.sampled_from(["linear", "conv", "conv_transpose"]),
    st.integers(1, 3),
    st.integers(1, 3).map(lambda n: 4 * n),
    st.integers(1, 3).map(lambda n: 2 * n),
    st.integers(1, 3),
)
granularities = st.sampled_from(["weight", "unit", "block:2x4", "block:1x2", "2:4", "1:2", "4:4"]).map(
    parse_granularity
)


@given(layers, granularities, st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_expand_undoes_pool(layer, granularity, seed):
    (target,) = find_targets(layer)
    keep = granularity.pool(target, torch.zeros(target.shape), "sum")
    keep = torch.rand(keep.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = granularity.expand(target, keep)
    assert mask.shape == target.shape
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    # Pooling the mask gives each cell all of its weights or none: cells do not overlap and cover everything.
    pooled = granularity.pool(target, mask.double(), "mean")
    assert torch.equal(pooled, keep.double())


@given(
    layers, st.sampled_from(["unit", "block:2x4"]).map(parse_granularity), st.sampled_from(["sum", "mean", "l1", "l2"])
)
@settings(max_examples=60, deadline=None)
def test_pooling_reduces_over_the_weights_of_a_cell(layer, granularity, how):
    (target,) = find_targets(layer)
    weight = layer.weight.detach()
    cells = granularity.pool(target, weight, how)
    first = torch.zeros(cells.shape, dtype=torch.bool)
    first.view(-1)[0] = True
    inside = weight[granularity.expand(target, first)].double()
    expected = {"sum": inside.sum(), "mean": inside.mean(), "l1": inside.abs().sum(), "l2": inside.norm()}[how]
    torch.testing.assert_close(cells.view(-1)[0].double(), expected, rtol=1e-5, atol=1e-6)


@given(layers, st.sampled_from([(2, 4), (1, 4), (1, 2)]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_n_of_m_groups_run_along_input_channels(layer, nm, seed):
    n, m = nm
    (target,) = find_targets(layer)
    scores = torch.rand(target.shape, generator=torch.Generator().manual_seed(seed))
    cells = NofM(n, m).pool(target, scores, "sum")
    assert cells.shape == (target.numel // m, m)
    keep = torch.zeros(cells.shape, dtype=torch.bool).scatter_(1, cells.topk(n, 1).indices, True)
    mask = NofM(n, m).expand(target, keep)
    channels = target.shape[0] // target.groups if target.kind == "conv_transpose" else target.shape[1]
    # Independent of pool: for each unit and kernel position, every m consecutive input channels keep n.
    per = target.rows(mask).reshape(target.units, channels, -1)
    assert bool((per.reshape(target.units, channels // m, m, -1).sum(2) == n).all())
    assert mask.float().mean() == n / m


def test_l2_pooling_does_not_overflow():
    assert float(pool_cells(torch.full((1, 4), 1e30), "l2")) == pytest.approx(2e30)
    with pytest.raises(UnknownNameError, match='"max"'):
        pool_cells(torch.ones(1, 2), "max")


@pytest.mark.parametrize("text", ["weight", "unit", "block:4x1", "2:4"])
def test_text_and_back(text):
    assert str(parse_granularity(text)) == text
    granularity = parse_granularity(text)
    assert parse_granularity(granularity) is granularity


def test_parsed_types():
    assert parse_granularity("weight") == Weight()
    assert parse_granularity("unit") == Unit()
    assert parse_granularity("block:4x1") == Block(4, 1)
    assert parse_granularity("2:4") == NofM(2, 4)


@pytest.mark.parametrize("text", ["units", "block:0x2", "block:2", "0:4", "5:4", "2:4:8", ""])
def test_what_is_no_granularity_is_refused(text):
    with pytest.raises(UnknownNameError, match="granularity"):
        parse_granularity(text)


def test_shapes_that_do_not_divide_name_the_layer():
    network = nn.ModuleDict({"conv2": nn.Conv2d(6, 4, 3)})
    (target,) = find_targets(network)
    with pytest.raises(UsageError, match=r'layer "conv2": 6 channels cannot form 2:4 groups.*6 % 4'):
        NofM(2, 4).pool(target, torch.ones(target.shape), "sum")
    with pytest.raises(UsageError, match='layer "conv2": 4 x 54 weights do not divide into 3 x 4'):
        Block(3, 4).pool(target, torch.ones(target.shape), "sum")
