"""The loss without each unit, against a network in NumPy that leaves it out."""

from __future__ import annotations

import linear_network as f1
import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.targets import find_targets
from secateur.criteria.driver import score_targets
from secateur.criteria.oracle import Oracle
from secateur.sparsify.rounds import prune_in_rounds


def test_linear_network_by_hand():
    # f = W2 W1 x = 1 * 3 - 2 * 0 = 3, y = 1: without unit 0 f = 0, without unit 1 f = 3, without the output f = 0.
    network = f1.network()
    (scores,) = score_targets(network, find_targets(network), [Oracle()], batches=f1.batches(), loss=f1.half_squares)
    assert scores["0.weight"].tolist() == [0.5, 2.0]
    assert scores["1.weight"].tolist() == [0.5]


def _loss(x, y, a, ba, b, bb, scale=None, shift=None):
    hidden = x @ a.T + ba
    if scale is not None:
        hidden = hidden * scale + shift
    logits = np.maximum(hidden, 0) @ b.T + bb
    logits = logits - logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(y)), y]).mean())


@pytest.mark.parametrize("norm", [False, True])
def test_relu_network_in_numpy(norm):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), *([nn.BatchNorm1d(5)] if norm else []), nn.ReLU(), nn.Linear(5, 3)]
    network = nn.Sequential(*layers).double().eval()
    if norm:
        for tensor in (network[1].weight, network[1].bias, network[1].running_mean):
            nn.init.normal_(tensor)
    p = {n: t.detach().numpy().copy() for n, t in network.state_dict().items()}
    last = "3" if norm else "2"
    scale = shift = None
    if norm:
        scale = p["1.weight"] / np.sqrt(p["1.running_var"] + 1e-5)
        shift = p["1.bias"] - p["1.running_mean"] * scale
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(11, 4)), generator.integers(3, size=11)
    hidden, output = [], []
    for unit in range(5):
        keep = np.arange(5) != unit
        more = (scale * keep, shift * keep) if norm else ()
        hidden.append(
            _loss(
                x, y, p["0.weight"] * keep[:, None], p["0.bias"] * keep, p[last + ".weight"], p[last + ".bias"], *more
            )
        )
    for unit in range(3):
        keep = np.arange(3) != unit
        output.append(
            _loss(
                x,
                y,
                p["0.weight"],
                p["0.bias"],
                p[last + ".weight"] * keep[:, None],
                p[last + ".bias"] * keep,
                *((scale, shift) if norm else ()),
            )
        )
    for sizes in ([11], [4, 6, 1]):
        batches = list(zip(torch.tensor(x).split(sizes), torch.tensor(y).split(sizes), strict=True))
        (scores,) = score_targets(network, find_targets(network), [Oracle()], batches=batches)
        np.testing.assert_allclose(scores["0.weight"].numpy(), hidden)
        np.testing.assert_allclose(scores[last + ".weight"].numpy(), output)


def test_greedy_search_is_pruning_in_rounds():
    """One unit a round, the best one to lose given those already gone: by brute force."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)).double()
    p = {n: t.detach().numpy() for n, t in network.state_dict().items()}
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(20, 4)), generator.integers(3, size=20)
    gone: list[int] = []
    for _ in range(3):
        losses = {}
        for unit in set(range(6)) - set(gone):
            keep = ~np.isin(np.arange(6), [*gone, unit])
            losses[unit] = _loss(x, y, p["0.weight"] * keep[:, None], 0.0, p["2.weight"], p["2.bias"])
        gone.append(min(losses, key=losses.__getitem__))
    batches = [(torch.tensor(x), torch.tensor(y))]
    targets = find_targets(network, ["0"])
    # (1 - 1/2)^(t / 4) of 6 units, rounded: one goes in round 2, 3 and 4.
    masks = prune_in_rounds(network, Oracle(), 0.5, 4, granularity="unit", targets=targets, batches=batches)
    assert set(np.flatnonzero(~masks["0.weight"][:, 0].numpy()).tolist()) == set(gone)
