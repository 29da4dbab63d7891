"""Units removed by a criterion: counts, no rescaling, records."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.errors import SecateurError
from secateur.variants import UnitsByCriterion, Workbench, variant_from


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2))


def _bench(network=None):
    return Workbench(_net() if network is None else network, batches=[torch.zeros(2, 3)])


def test_the_lowest_norms_go_and_the_rest_is_as_it_was():
    network = _net()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([3.0, 1, 2, 1, 5, 4])[:, None].expand(6, 3))
    own = [p.clone() for p in network.parameters()]
    bench = _bench(network)
    with bench.variant(UnitsByCriterion(removed={"0": 2, "2.weight": 9})) as model:
        # Of two equal ones both go; units 1 and 3.
        kept = torch.tensor([1.0, 0, 1, 0, 1, 1])
        assert torch.equal(model[0].weight, own[0] * kept[:, None])
        assert torch.equal(model[0].bias, own[1] * kept)
        assert int((model[2].weight != 0).any(1).sum()) == 1
        assert torch.equal(model[4].weight, own[4])
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), own, strict=True))


def test_a_fraction_is_rounded_down_and_counts_go_before_it():
    kept = UnitsByCriterion(0.3, {"0": 5}).kept(_bench())
    assert [int(k.sum()) for k in kept.values()] == [1, 7, 2]
    assert all(bool(k.all()) for k in UnitsByCriterion().kept(_bench()).values())
    assert [int(k.sum()) for k in UnitsByCriterion(0.999).kept(_bench()).values()] == [1, 1, 1]


def test_of_equal_scores_the_lowest_index_goes_first():
    network = _net()
    nn.init.ones_(network[2].weight)
    assert UnitsByCriterion(removed={"2": 4}).kept(_bench(network))["2.weight"].tolist() == [False] * 4 + [True] * 6


def test_another_criterion():
    network = _net()
    with torch.no_grad():
        network[0].weight.copy_(torch.arange(18.0).reshape(6, 3))
    drawn = UnitsByCriterion(0.5, criterion="random").kept(_bench(network))["0.weight"]
    ranked = UnitsByCriterion(0.5).kept(_bench(network))["0.weight"]
    assert int(drawn.sum()) == int(ranked.sum()) == 3
    assert not torch.equal(drawn, ranked)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.lists(st.tuples(st.text(), st.integers(0, 99))))
def test_records_go_through_json(sparsity, removed):
    variant = UnitsByCriterion(sparsity, tuple(removed))
    again = variant_from(json.loads(json.dumps(variant.record())))
    assert again == variant
    assert hash(again) == hash(variant)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.integers(0, 9))
def test_as_many_go_as_are_asked_for(first, second):
    kept = UnitsByCriterion(removed={"0": first, "2": second}).kept(_bench())
    assert int((~kept["0.weight"]).sum()) == first
    assert int((~kept["2.weight"]).sum()) == second


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: UnitsByCriterion(1.0), "sparsity is a number in [0, 1)"),
        (lambda: UnitsByCriterion(removed=3), "removed is pairs of a layer's name and a number, got 3"),
        (lambda: UnitsByCriterion(removed=(("0", -1),)), "removed is an integer, at least 0"),
        (lambda: UnitsByCriterion(removed=((0, 1),)), "removed is pairs of a layer's name"),
        (lambda: UnitsByCriterion(criterion=3), "criterion is a name, got 3"),
        (
            lambda: UnitsByCriterion(removed=(("0", 3), ("0.weight", 5))).kept(_bench()),
            'removed has "0.weight" twice, 3 and 5 units; give each layer once',
        ),
        (lambda: UnitsByCriterion(removed={"0": 6}).kept(_bench()), '"0.weight" has 6 units, so 0 to 5 can go, got 6'),
        (lambda: UnitsByCriterion(removed={"7": 1}).kept(_bench()), 'unknown layer "7"'),
        (lambda: UnitsByCriterion(0.5, criterion="magnitud").kept(_bench()), "magnitude"),
    ],
)
def test_bad_numbers_get_one_line(make, said):
    with pytest.raises(SecateurError) as caught:
        make()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
