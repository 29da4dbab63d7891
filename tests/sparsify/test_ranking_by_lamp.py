"""LAMP through `rank`: masks without scores, and the same as from them."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.core import tail_share
from secateur.core.targets import find_targets
from secateur.criteria.driver import score_targets
from secateur.criteria.lamp import Lamp
from secateur.criteria.magnitude import Magnitude
from secateur.errors import UsageError
from secateur.sparsify.iterate import next_masks
from secateur.sparsify.ranking import SelectionRule, rank
from secateur.sparsify.rounds import prune_in_rounds


def _network(values="normal", seed=0):
    network = nn.ModuleList(
        [
            nn.Linear(40, 30),
            nn.Conv2d(8, 12, 3, groups=2, bias=False),
            nn.ConvTranspose2d(8, 12, 2, groups=2),
            nn.Conv1d(16, 4, 3),
        ]
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if values == "quantized":
                parameter.copy_((parameter * 2).round())
            if values == "zero":
                parameter.zero_()
    return network


def _from_scores(ranking):
    return replace(ranking, cells=dict(ranking.cells))


def _without_scores():
    return mock.patch.object(Lamp, "score", side_effect=AssertionError("scores were computed"))


@given(
    st.builds(_network, st.sampled_from(["normal", "quantized", "zero"]), st.integers(0, 2**31)),
    st.sampled_from(["tensor", "global", "column"]),
    st.floats(0, 0.999),
    st.integers(0, 3),
    st.sampled_from(["prune_floor", "keep_floor", "nearest"]),
)
@settings(max_examples=100, deadline=None)
def test_masks_are_those_of_the_complete_scores(network, scope, sparsity, min_keep, rounding):
    rule = SelectionRule(scope=scope, min_keep=min_keep, rounding=rounding)
    ranking = rank(network, Lamp(), rule=rule)
    with mock.patch.multiple(tail_share, _SAMPLE=32), _without_scores():
        masks = ranking.masks(sparsity)
    complete = _from_scores(ranking).masks(sparsity)
    assert list(masks) == list(complete)
    assert masks == complete


@pytest.mark.parametrize("values", ["normal", "quantized"])
def test_in_a_tensor_it_is_magnitude(values):
    network = _network(values)
    with _without_scores():
        for granularity, rule, sparsity in [
            ("weight", SelectionRule(allocation="erk"), 0.6),
            ("weight", SelectionRule(scope="column"), 0.6),
            ("2:4", SelectionRule(), 0.5),
        ]:
            by_lamp, by_magnitude = (
                rank(network, criterion, granularity=granularity, rule=rule) for criterion in (Lamp(), Magnitude())
            )
            assert by_lamp.masks(sparsity) == by_magnitude.masks(sparsity)
    by_lamp = rank(network, Lamp(), granularity="2:4")
    assert by_lamp.masks(0.5) == _from_scores(by_lamp).masks(0.5)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_random_ties_are_those_of_the_scores(scope):
    ranking = rank(_network("quantized"), Lamp(), rule=SelectionRule(scope=scope, ties="random", seed=3))
    assert ranking.masks(0.7) == _from_scores(ranking).masks(0.7)


def test_scores_are_there_when_asked_for():
    network = _network()
    targets = find_targets(network)
    (scores,) = score_targets(network, targets, [Lamp()])
    cells = rank(network, Lamp()).cells
    assert cells.keys() == scores.keys()
    assert all(torch.equal(cells[n], scores[n]) for n in scores)
    by_unit = rank(network, Lamp(), granularity="unit").cells
    assert torch.equal(by_unit["0.weight"], scores["0.weight"].sum(1))


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_rounds_take_from_what_is_left(scope):
    network, rule = _network(), SelectionRule(scope=scope)
    once = rank(network, Lamp(), rule=rule).masks(0.8)
    # The sum over what is larger does not change when smaller ones go.
    assert prune_in_rounds(network, Lamp(), 0.8, 4, rule=rule) == once
    ranking = rank(network, Lamp(), rule=rule)
    first = next_masks(ranking, None, 0.5)
    assert next_masks(ranking, first, 0.5) == next_masks(_from_scores(ranking), first, 0.5)
    assert (first & once) == once


def test_bad_sparsity_is_refused():
    with pytest.raises(UsageError, match=r"\[0, 1\), got 1"):
        rank(_network(), Lamp(), rule=SelectionRule(scope="global")).masks(1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_on_a_gpu():
    network = _network().cuda()
    masks = rank(network, Lamp(), rule=SelectionRule(scope="global")).masks(0.8)
    assert all(mask.is_cuda for mask in masks.values())
    on_cpu = rank(network.cpu(), Lamp(), rule=SelectionRule(scope="global")).masks(0.8)
    assert all(torch.equal(masks[n].cpu(), on_cpu[n]) for n in on_cpu)
