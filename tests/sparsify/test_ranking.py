"""Asked is got, nested and idempotent, through the whole path from a network to its masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.core.allocation import erk
from secateur.core.granularity import parse_granularity
from secateur.core.groups import Group, Groups, Member
from secateur.core.masks import Masks
from secateur.core.select import prune_count
from secateur.core.targets import find_targets
from secateur.criteria.bn_gamma import BnGamma
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.mean_activation import MeanActivation
from secateur.criteria.random import Random
from secateur.errors import DataError, NoEffectError, UnknownNameError, UsageError
from secateur.sparsify.ranking import SelectionRule, rank, rank_units


def _layer(kind, groups, ins, outs, kernel):
    if kind == "linear":
        return nn.Linear(groups * ins, groups * outs)
    family = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv_transpose": nn.ConvTranspose2d}[kind]
    return family(groups * ins, groups * outs, kernel, groups=groups)


layers = st.builds(
    _layer,
    st.sampled_from(["linear", "conv1d", "conv2d", "conv_transpose"]),
    st.integers(1, 3),
    st.integers(1, 2).map(lambda n: 4 * n),
    st.integers(1, 3).map(lambda n: 2 * n),
    st.integers(1, 2),
)
networks = st.lists(layers, min_size=1, max_size=3).map(nn.ModuleList)
shapes = st.sampled_from(["weight", "unit", "block:2x4", "block:1x2"])
scopes = st.sampled_from(["tensor", "global"])
sparsities = st.floats(0, 0.999)
criteria = st.sampled_from([Magnitude(), Magnitude(order=1), Random()])


def _fill(network, values, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if values == "quantized":
                parameter.copy_((parameter * 2).round())
            if values == "zero":
                parameter.zero_()
    return network


filled = st.builds(_fill, networks, st.sampled_from(["normal", "quantized", "zero"]), st.integers(0, 2**31))


def _cells(network, granularity):
    shape = parse_granularity(granularity)
    return {t.name: shape.pool(t, torch.zeros(t.shape), "sum").numel() for t in find_targets(network)}


@given(filled, criteria, shapes, scopes, sparsities, st.integers(0, 2), st.sampled_from(["index", "random"]))
@settings(max_examples=200, deadline=None)
def test_asked_is_got(network, criterion, granularity, scope, sparsity, min_keep, ties):
    rule = SelectionRule(scope=scope, min_keep=min_keep, ties=ties, seed=4)
    masks = rank(network, criterion, granularity=granularity, rule=rule).masks(sparsity)
    cells = _cells(network, granularity)
    shape = parse_granularity(granularity)
    pruned = {}
    for target in find_targets(network):
        mask = masks[target.name]
        assert mask.shape == target.shape
        share = shape.pool(target, mask.double(), "mean")
        assert bool(((share == 0) | (share == 1)).all()), "a cell was cut in two"
        pruned[target.name] = int((share == 0).sum())
        assert int((share == 1).sum()) >= min(min_keep, cells[target.name])
    if scope == "tensor":
        for name, count in cells.items():
            assert pruned[name] == min(prune_count(count, sparsity), count - min(min_keep, count))
    else:
        total = sum(cells.values())
        safe = sum(min(min_keep, c) for c in cells.values())
        assert sum(pruned.values()) == min(prune_count(total, sparsity), total - safe)
    if granularity == "weight" and scope == "global" and min_keep == 0:
        assert masks.total - masks.kept == math.floor(masks.total * sparsity + 1e-9)


@given(filled, criteria, shapes, scopes, sparsities, sparsities, st.sampled_from(["index", "random"]))
@settings(max_examples=150, deadline=None)
def test_nested_over_sparsity(network, criterion, granularity, scope, a, b, ties):
    ranking = rank(network, criterion, granularity=granularity, rule=SelectionRule(scope=scope, ties=ties, seed=4))
    less, more = ranking.masks(min(a, b)), ranking.masks(max(a, b))
    assert all(bool((less[n] | ~more[n]).all()) for n in less)
    assert (less & more) == more
    assert (less | more) == less


@given(
    st.builds(_fill, networks, st.just("normal"), st.integers(0, 2**31)),
    st.sampled_from([Magnitude(), Magnitude(order=1)]),
    shapes,
    scopes,
    sparsities,
    st.integers(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_idempotent(network, criterion, granularity, scope, sparsity, min_keep):
    rule = SelectionRule(scope=scope, min_keep=min_keep)
    masks = rank(network, criterion, granularity=granularity, rule=rule).masks(sparsity)
    masks.apply_(network)
    assert rank(network, criterion, granularity=granularity, rule=rule).masks(sparsity) == masks


@given(filled, st.sampled_from(["2:4", "1:4", "1:2"]))
@settings(max_examples=60, deadline=None)
def test_n_of_m_keeps_the_largest_n_of_every_m(network, granularity):
    shape = parse_granularity(granularity)
    masks = rank(network, Magnitude(), granularity=granularity).masks(shape.sparsity)
    for target in find_targets(network):
        keep = shape.pool(target, masks[target.name], "sum")
        scores = shape.pool(target, network.get_parameter(target.name).detach().abs(), "sum")
        assert bool((keep.sum(1) == shape.n).all())
        lowest_kept = scores.masked_fill(~keep, float("inf")).min(1).values
        highest_gone = scores.masked_fill(keep, -1).max(1).values
        assert bool((lowest_kept >= highest_gone).all())
    with pytest.raises(UsageError, match=rf"{granularity} always removes"):
        rank(network, Magnitude(), granularity=granularity).masks(0.3)


@given(filled, sparsities, st.integers(0, 2))
@settings(max_examples=80, deadline=None)
def test_columns_prune_the_same_number_in_every_unit(network, sparsity, min_keep):
    rule = SelectionRule(scope="column", min_keep=min_keep)
    masks = rank(network, Magnitude(), rule=rule).masks(sparsity)
    for target in find_targets(network):
        rows = target.rows(masks[target.name])
        width = target.fan_in
        expected = min(prune_count(width, sparsity), width - min(min_keep, width))
        assert bool(((~rows).sum(1) == expected).all())
        magnitudes = target.rows(network.get_parameter(target.name).detach().abs()).numpy()
        reference = np.ones(rows.shape, bool)
        np.put_along_axis(reference, np.argsort(magnitudes, axis=1, kind="stable")[:, :expected], False, axis=1)
        assert np.array_equal(rows.numpy(), reference)


def test_columns_need_single_weights():
    with pytest.raises(UsageError, match="column"):
        rank(nn.Linear(4, 3), Magnitude(), granularity="unit", rule=SelectionRule(scope="column")).masks(0.5)


@given(filled, shapes, sparsities)
@settings(max_examples=80, deadline=None)
def test_erk_totals(network, granularity, sparsity):
    targets = find_targets(network)
    rule = SelectionRule(allocation="erk", min_keep=0)
    masks = rank(network, Magnitude(), granularity=granularity, rule=rule).masks(sparsity)
    shares, cells = erk(targets, sparsity), _cells(network, granularity)
    lost = 0.0
    for target in targets:
        pruned = int((~masks[target.name]).sum()) * cells[target.name] // target.numel
        assert pruned == prune_count(cells[target.name], shares[target.name])
        lost += target.numel / cells[target.name]
    # Rounding down keeps less than one cell too many in each tensor.
    wanted = sparsity * masks.total
    assert wanted - lost - 1e-6 < masks.total - masks.kept <= wanted + 1e-6


def test_rounding_rules_reach_the_masks():
    layer = nn.Linear(1, 10)
    counts = {
        rounding: rank(layer, Magnitude(), granularity="unit", rule=SelectionRule(rounding=rounding)).masks(0.75).kept
        for rounding in ("prune_floor", "keep_floor", "nearest")
    }
    assert counts == {"prune_floor": 3, "keep_floor": 2, "nearest": 2}


def test_an_allocation_and_scope_global_contradict():
    with pytest.raises(UsageError, match="allocation"):
        rank(nn.Linear(4, 3), Magnitude(), rule=SelectionRule(scope="global", allocation="erk")).masks(0.5)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("granularity", ["weight", "unit", "2:4"])
def test_sparsity_outside_zero_and_one_is_refused(sparsity, granularity):
    with pytest.raises(UsageError, match=r"\[0, 1\)"):
        rank(nn.Linear(4, 3), Magnitude(), granularity=granularity).masks(sparsity)


def test_bad_requests_are_refused_in_one_line():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(UnknownNameError, match='unknown granularity "filter"'):
        rank(network, Magnitude(), granularity="filter")
    with pytest.raises(UsageError, match="need data"):
        rank(network, MeanActivation(), granularity="unit")
    with pytest.raises(UsageError, match="use granularity unit"):
        rank(network, BnGamma(), granularity="weight", batches=[torch.ones(2, 3, 2, 2)])
    with pytest.raises(NoEffectError):
        rank(nn.ReLU(), Magnitude())
    with torch.no_grad():
        network[0].weight[0, 1] = float("nan")
    with pytest.raises(DataError, match=r'scores of "0\.weight".*first NaN at flat index 1'):
        rank(network, Magnitude()).masks(0.5)


def test_tied_weights_are_counted_once():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    masks = rank(network, Magnitude(), rule=SelectionRule(scope="global")).masks(0.5)
    assert (list(masks), masks.total, masks.kept) == (["0.weight"], 16, 8)


# Units of dependency groups.


def _groups(network, blocks=1):
    """conv1 -> (BatchNorm) -> conv2 written out by hand, and a blocked head."""
    units = network[0].out_channels
    index = np.arange(units)[:, None]
    members = (
        Member("0.weight", 0, "producer", index),
        Member("0.bias", 0, "producer", index),
        Member("1.weight", 0, "follower", index),
        Member("1.bias", 0, "follower", index),
        Member("3.weight", 1, "consumer", index, groups=network[3].groups),
    )
    head = Group("3.weight", 4, (Member("3.weight", 0, "producer", np.arange(4)[:, None]),), blocked="output")
    return Groups([Group("0.weight", units, members, blocks=blocks), head])


def _network(units, groups=1):
    torch.manual_seed(units)
    return nn.Sequential(
        nn.Conv2d(2, units, 3), nn.BatchNorm2d(units), nn.ReLU(), nn.Conv2d(units, 4, 1, groups=groups)
    )


@given(st.integers(1, 4), st.integers(1, 5), sparsities, scopes, st.sampled_from(["prune_floor", "keep_floor"]))
@settings(max_examples=100, deadline=None)
def test_units_of_groups_asked_is_got_in_every_block(blocks, per_block, sparsity, scope, rounding):
    blocks = 1 if blocks == 3 else blocks
    network = _network(blocks * per_block, groups=blocks)
    groups = _groups(network, blocks)
    ranking = rank_units(network, Magnitude(), groups, rule=SelectionRule(scope=scope, rounding=rounding))
    kept = ranking.kept(sparsity)
    assert list(kept) == ["0.weight"]
    keep = kept["0.weight"].reshape(blocks, per_block)
    removed = min(prune_count(per_block, sparsity, rounding), per_block - 1)
    assert (~keep).sum(1).tolist() == [removed] * blocks
    norms = network[0].weight.detach().double().flatten(1).norm(dim=1).reshape(blocks, per_block)
    for block in range(blocks):
        if removed:
            assert norms[block][~keep[block]].max() <= norms[block][keep[block]].min()
    more = ranking.kept(min(0.999, sparsity + 0.2))["0.weight"]
    assert bool((kept["0.weight"] | ~more).all())
    masks = ranking.masks(sparsity)
    gone = ~kept["0.weight"]
    if removed:
        assert set(masks) == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight"}
        assert torch.equal(masks["0.weight"], (~gone)[:, None, None, None].expand_as(masks["0.weight"]))
        assert torch.equal(masks["1.bias"], ~gone)
        masks.apply_(network)
        x = network[2](network[1].eval()(network[0](torch.randn(3, 2, 4, 4))))
        assert bool((x[:, gone] == 0).all())


def test_units_need_a_group_that_may_be_cut():
    network = _network(4)
    only_blocked = Groups([g for g in _groups(network) if g.blocked])
    with pytest.raises(NoEffectError, match=r"blocked: 3\.weight \(output\)"):
        rank_units(network, Magnitude(), only_blocked)
    with pytest.raises(NoEffectError, match="no unit may be removed"):
        rank_units(network, Magnitude(), _groups(network), targets=find_targets(network, exclude=["0"]))
    with pytest.raises(UsageError, match="allocation uniform"):
        rank_units(network, Magnitude(), _groups(network), rule=SelectionRule(allocation="erk"))


def test_coupled_producers_share_their_mean_score():
    network = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False), "b": nn.Linear(2, 3, bias=False)})
    with torch.no_grad():
        network["a"].weight.copy_(torch.tensor([[3.0, 0], [1.0, 0], [2.0, 0]]))
        network["b"].weight.copy_(torch.tensor([[0.0, 0], [1.0, 0], [4.0, 0]]))
    index = np.arange(3)[:, None]
    members = (Member("a.weight", 0, "producer", index), Member("b.weight", 0, "producer", index))
    ranking = rank_units(network, Magnitude(), Groups([Group("a.weight", 3, members)]))
    assert ranking.scores["a.weight"].tolist() == [1.5, 1.0, 3.0]
    assert ranking.kept(0.4)["a.weight"].tolist() == [True, False, True]
    assert isinstance(ranking.masks(0.4), Masks)


def test_units_can_be_ranked_by_data():
    network = _network(6)
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([0.5, -3.0, 0.1, 2.0, -0.2, 1.0]))
    batches = [(torch.randn(4, 2, 5, 5), torch.zeros(4).long())]
    kept = rank_units(network, BnGamma(), _groups(network), batches=batches).kept(0.5)["0.weight"]
    assert kept.tolist() == [False, True, False, True, False, True]
