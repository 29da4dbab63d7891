"""Pruning in rounds: exact, nested, any granularity, and the model as found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.core.targets import find_targets
from secateur.criteria.base import Criterion
from secateur.criteria.grasp import Grasp
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.mean_activation import MeanActivation
from secateur.errors import UsageError
from secateur.sparsify.ranking import SelectionRule, rank
from secateur.sparsify.rounds import prune_in_rounds


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.Flatten(), nn.Linear(24, 4))


def _batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 2, 6, 6, generator=generator), torch.arange(4)) for _ in range(2)]


class Watched(Criterion):
    """Magnitude that remembers how many weights of each layer it has seen at zero."""

    absolute = True

    def __init__(self):
        self.zeros = []

    def score(self, evidence):
        self.zeros.append(int((evidence.weight == 0).sum()))
        return evidence.weight.clone()


@pytest.mark.parametrize("granularity", ["weight", "unit", "block:2x1"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_rounds_of_magnitude_end_where_one_round_does(granularity, scope):
    network, rule = _network(), SelectionRule(scope=scope)
    targets = find_targets(network, exclude=["@last"])
    once = rank(network, Magnitude(), granularity=granularity, rule=rule, targets=targets).masks(0.7)
    many = prune_in_rounds(network, Magnitude(), 0.7, 7, granularity=granularity, rule=rule, targets=targets)
    assert many == once


def test_each_round_scores_the_network_as_masked_so_far():
    network, watched = nn.Linear(20, 5), Watched()
    masks = prune_in_rounds(network, watched, 0.96, 4)
    assert watched.zeros == [0, *(int(100 * (1 - 0.04 ** (t / 4)) + 1e-9) for t in (1, 2, 3))]
    assert masks.kept == 4


@pytest.mark.parametrize("criterion", [Grasp(), MeanActivation(order="maximum")], ids=str)
def test_what_is_gone_stays_gone_even_where_zero_is_not_the_lowest_score(criterion):
    network = _network()
    granularity = "weight" if isinstance(criterion, Grasp) else "unit"
    state = {n: t.clone() for n, t in network.state_dict().items()}
    # An iterator serves all rounds.
    masks = prune_in_rounds(network, criterion, 0.75, 6, granularity=granularity, batches=iter(_batches()))
    for name, kept, total in masks.layers():
        weights = total // network.get_parameter(name)[0].numel() if granularity == "unit" else total
        assert total - kept == int(0.75 * weights + 1e-9) * (total // weights)
    assert all(torch.equal(t, state[n]) for n, t in network.state_dict().items())


def test_an_error_puts_the_weights_back():
    network = _network()
    state = {n: t.clone() for n, t in network.state_dict().items()}
    calls = []

    def loss(outputs, labels):
        calls.append(1)
        if len(calls) > 20:
            raise ZeroDivisionError
        return nn.functional.cross_entropy(outputs, labels)

    with pytest.raises(ZeroDivisionError):
        prune_in_rounds(network, Grasp(), 0.9, 100, batches=_batches(), loss=loss)
    assert all(torch.equal(t, state[n]) for n, t in network.state_dict().items())


def test_impossible_requests():
    with pytest.raises(UsageError, match="rounds is at least 1"):
        prune_in_rounds(_network(), Magnitude(), 0.5, 0)
    with pytest.raises(UsageError, match=r"lies in \[0, 1\)"):
        prune_in_rounds(_network(), Magnitude(), 1.0)
    with pytest.raises(UsageError, match="always removes"):
        prune_in_rounds(nn.Linear(4, 4), Magnitude(), 0.5, 2, granularity="2:4")
