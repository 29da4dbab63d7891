"""Rounds remove exactly what DropNet's counts say, and nothing ever comes back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.core.groups import Groups
from secateur.core.seeds import keyed_generator
from secateur.criteria.magnitude import Magnitude
from secateur.errors import UsageError
from secateur.sparsify.iterate import next_masks, next_units, share_after_round
from secateur.sparsify.ranking import SelectionRule, rank, rank_units
from secateur.surgery.engine import trace_groups

WIDE, SMALL = (64, 64, 128, 128), (40, 40)
# Tan and Motani's schedule: 20 % of what remains, until at most 10 % is left.
COUNTS = {
    (WIDE, "global"): [384, 308, 247, 198, 159, 128, 103, 83, 67, 54, 44, 36],
    (WIDE, "tensor"): [384, 310, 250, 202, 164, 134, 110, 90, 74, 62, 50, 42, 36],
    (SMALL, "global"): [80, 64, 52, 42, 34, 28, 23, 19, 16, 13, 11, 9, 8],
    (SMALL, "tensor"): [80, 64, 52, 42, 34, 28, 24, 20, 16, 14, 12, 10, 8],
}


def _mlp(widths):
    sizes = [6, *widths, 3]
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


@pytest.mark.parametrize(("widths", "scope"), COUNTS)
def test_unit_counts_of_every_round(widths, scope):
    network = _mlp(widths)
    groups: Groups = trace_groups(network, torch.randn(2, 6)).prunable()
    rule = SelectionRule(scope=scope, min_keep=1)
    kept, found = None, [sum(widths)]
    while found[-1] > 0.1 * sum(widths):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(generator=keyed_generator(len(found), "round"))
        before, kept = kept, next_units(rank_units(network, Magnitude(), groups, rule=rule), kept, 0.2)
        if before is not None:
            assert all(bool((before[n] | ~kept[n]).all()) for n in kept), "a removed unit came back"
        found.append(sum(int(k.sum()) for k in kept.values()))
    assert found == COUNTS[widths, scope]


@pytest.mark.parametrize(("round_up", "counts"), [(True, [10, 8, 6, 4, 3, 2, 1]), (False, [10, 8, 7, 6, 5, 4, 3])])
def test_lottery_ticket_rounds_of_ten_weights(round_up, counts):
    network = nn.Linear(10, 1)
    masks, found = None, [10]
    for _ in range(6):
        masks = next_masks(rank(network, Magnitude(), rule=SelectionRule(min_keep=0)), masks, 0.2, round_up)
        found.append(masks.kept)
    assert found == counts


@given(
    cells=st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1),
    fraction=st.floats(0.01, 0.99),
    scope=st.sampled_from(["tensor", "global"]),
)
def test_shares_are_exact_counts(cells, fraction, scope):
    total = {n: kept + gone for n, (kept, gone) in cells.items()}
    left = {n: kept for n, (kept, _) in cells.items()}
    share = share_after_round(left, total, fraction, scope)
    if scope == "global":
        share, total, left = {"all": share}, {"all": sum(total.values())}, {"all": sum(left.values())}
        floor = len(cells)
    else:
        floor = 1
    for name, value in share.items():
        gone = value * total[name]
        assert gone == pytest.approx(round(gone), abs=1e-6)
        remaining = total[name] - round(gone)
        expected = left[name] - max(1, int(fraction * left[name] + 1e-9))
        assert remaining == max(expected, min(floor, left[name]))


def test_what_is_gone_stays_gone_whatever_the_scores():
    network = _mlp(SMALL)
    first = next_masks(rank(network, Magnitude()), None, 0.5)
    with torch.no_grad():
        network[0].weight.mul_(torch.where(first["0.weight"], 1e-6, 1e6))
    second = next_masks(rank(network, Magnitude()), first, 0.5)
    assert all(bool((first[n] | ~second[n]).all()) for n in second)


def test_columns_are_refused():
    with pytest.raises(UsageError, match='use scope "tensor" or "global"'):
        share_after_round({"a": 2}, {"a": 4}, 0.5, "column")


def test_a_fraction_for_each_tensor():
    """Lottery tickets on 784-300-100-10: a fifth of each layer a round, of the output layer a tenth."""
    total = {"a": 235_200, "b": 30_000, "out": 1_000}
    left, seen = dict(total), []
    for _ in range(3):
        share = share_after_round(left, total, {"a": 0.2, "b": 0.2, "out": 0.1}, "tensor", round_up=True)
        left = {name: round(size * (1 - share[name])) for name, size in total.items()}
        seen.append(tuple(left.values()))
    assert seen == [(188_160, 24_000, 900), (150_528, 19_200, 810), (120_422, 15_360, 729)]


def test_a_fraction_each_does_not_go_with_one_ranking_of_all():
    with pytest.raises(UsageError, match="one fraction for all tensors"):
        share_after_round({"a": 4}, {"a": 4}, {"a": 0.5}, "global")
