"""Synaptic flow on the linear network of F1, its conservation, and pruning in rounds."""

from __future__ import annotations

import linear_network as f1
import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.targets import find_targets
from secateur.criteria.driver import score_targets
from secateur.criteria.synflow import SynFlow
from secateur.errors import DataError
from secateur.sparsify.ranking import SelectionRule, rank
from secateur.sparsify.rounds import prune_in_rounds

GLOBAL = SelectionRule(scope="global", min_keep=0)


def _scores(network, batches):
    (scores,) = score_targets(network, find_targets(network), [SynFlow()], batches=batches)
    return scores


def test_f1():
    a1, a2, ones = np.abs(f1.W1), np.abs(f1.W2), np.ones(2)
    r = float((a2 @ a1 @ ones)[0])
    expected = [a1 * np.outer(a2[0], ones), a2 * (a1 @ ones)]
    assert r == 7
    assert [e.tolist() for e in expected] == [[[1, 2], [2, 2]], [[3, 4]]]
    # Neither the values of the data nor their number matter.
    for batches in (f1.batches(), f1.batches((5,)), [torch.randn(3, 2)]):
        for score, numbers in zip(_scores(f1.network(), batches).values(), expected, strict=True):
            assert score.dtype == torch.float64
            np.testing.assert_allclose(score.numpy(), numbers)
            assert float(score.sum()) == pytest.approx(r)


def _deep(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=2, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.ConvTranspose2d(6, 4, 2, bias=False),
        nn.Flatten(),
        nn.Linear(36, 8, bias=False),
        nn.ReLU(),
        nn.Linear(8, 3, bias=False),
    )


INPUTS = [torch.zeros(1, 2, 8, 8)]


def test_every_layer_sums_to_the_output():
    network = _deep()
    scores = _scores(network, INPUTS)
    with torch.no_grad():
        positive = _deep().double()
        for parameter in positive.parameters():
            parameter.abs_()
        r = float(positive(torch.ones(1, 2, 8, 8).double()).sum())
    for score in scores.values():
        assert float(score.sum()) == pytest.approx(r, rel=1e-12)


def test_each_unit_passes_on_what_it_receives():
    # Conservation unit by unit: what flows into a hidden neuron flows out of it.
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 4, bias=False))
    scores = _scores(network, [torch.zeros(1, 5)])
    torch.testing.assert_close(scores["0.weight"].sum(1), scores["2.weight"].sum(0))


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_rounds_reach_the_sparsity_exactly_and_empty_no_layer(sparsity):
    network = _deep()
    state = {n: t.clone() for n, t in network.state_dict().items()}
    masks = prune_in_rounds(network, SynFlow(), sparsity, rounds=100, rule=GLOBAL, batches=INPUTS)
    assert masks.total - masks.kept == int(masks.total * sparsity + 1e-9)
    assert all(kept for _, kept, _ in masks.layers())
    assert all(torch.equal(t, state[n]) for n, t in network.state_dict().items())
    # The masked network conserves its flow too, and still lets some through.
    masks.apply_(network)
    sums = [float(s.sum()) for s in _scores(network, INPUTS).values()]
    assert sums == pytest.approx([sums[0]] * len(sums))
    assert sums[0] > 0


def test_one_round_loses_more_flow_than_a_hundred():
    lost = {}
    for rounds in (1, 100):
        network = _deep()
        prune_in_rounds(network, SynFlow(), 0.97, rounds=rounds, rule=GLOBAL, batches=INPUTS).apply_(network)
        lost[rounds] = next(float(s.sum()) for s in _scores(network, INPUTS).values())
    assert lost[100] > lost[1]


def test_rounds_follow_the_algorithm_in_numpy():
    """Linear layers only, so that the flow is a product of matrices."""
    torch.manual_seed(2)
    network = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 6, bias=False), nn.Linear(6, 2, bias=False))
    weights = [layer.weight.detach().double().abs().numpy() for layer in network]
    masks = [np.ones_like(w) for w in weights]
    total, sparsity, rounds = sum(w.size for w in weights), 0.8, 10
    for t in range(1, rounds + 1):
        a, b, c = (w * m for w, m in zip(weights, masks, strict=True))
        ones_in, ones_out = np.ones(4), np.ones(2)
        flows = [a * np.outer(ones_out @ c @ b, ones_in), b * np.outer(ones_out @ c, a @ ones_in)]
        flows.append(c * np.outer(ones_out, b @ a @ ones_in))
        scores = np.concatenate([np.where(m == 1, f, -np.inf).ravel() for f, m in zip(flows, masks, strict=True)])
        gone = np.argsort(scores, kind="stable")[: int(np.floor(total * (1 - (1 - sparsity) ** (t / rounds)) + 1e-9))]
        flat = np.ones(total)
        flat[gone] = 0
        masks = [m.reshape(w.shape) for m, w in zip(np.split(flat, [20, 50]), weights, strict=True)]
    got = prune_in_rounds(network, SynFlow(), sparsity, rounds=rounds, rule=GLOBAL, batches=[torch.zeros(1, 4)])
    for mask, expected in zip(got.values(), masks, strict=True):
        assert mask.numpy().astype(float).tolist() == expected.tolist()
    once = rank(network, SynFlow(), rule=GLOBAL, batches=[torch.zeros(1, 4)]).masks(sparsity)
    assert prune_in_rounds(network, SynFlow(), sparsity, 1, rule=GLOBAL, batches=[torch.zeros(1, 4)]) == once


def test_a_network_that_nothing_flows_through_is_refused():
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    network[1].running_mean.fill_(1e3)
    with pytest.raises(DataError, match="nothing flows from the input to the output"):
        score_targets(network, find_targets(network), [SynFlow()], batches=[torch.ones(1, 1, 2, 2)])
