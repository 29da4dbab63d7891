"""Weights against sigma: exact counts, zeros, ends, refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import secateur.analysis.weight_cdf as module
from secateur.analysis.weight_cdf import weight_cdf
from secateur.core.targets import find_targets
from secateur.errors import DataError, UnknownNameError, UsageError
from secateur.testing.snapshots import same_values, values

SIGMAS = [0.3, 0.0, 0.05, 1.0, 0.3]


def _net(dtype=torch.float32):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 5)).to(dtype)
    net[0].weight.data[:3] = 0.0
    return net


@pytest.mark.parametrize("piece", [1 << 20, 7])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_counts_what_numpy_counts(monkeypatch, piece, zeros, dtype):
    monkeypatch.setattr(module, "_PIECE", piece)
    net = _net(dtype)
    before = copy.deepcopy(values(net))
    found = weight_cdf(net, SIGMAS, zeros=zeros)
    total = 0
    for name in ("0.weight", "3.weight"):
        size = np.abs(net.get_parameter(name).detach().double().numpy().ravel())
        size = size if zeros else size[size != 0]
        total += size.size
        assert found.counted[name] == size.size
        assert found.below[name] == tuple(int((size < s).sum()) for s in SIGMAS)
        assert found.layers[name] == tuple(float((size < s).mean()) for s in SIGMAS)
    assert found.shares == tuple(sum(b[i] for b in found.below.values()) / total for i in range(len(SIGMAS)))
    same_values("after", before, values(net))


def test_a_weight_of_exactly_sigma_is_not_below_it():
    net = nn.Linear(3, 1, bias=False)
    # 0.1 in float32 is a little more than 0.1 in float64, and the next float64 above it is more than both.
    net.weight.data = torch.tensor([[0.1, -0.5, 2.0]])
    single = float(np.float32(0.1))
    assert weight_cdf(net, [0.1, single, float(np.nextafter(single, 1)), 0.5, 2.0, 3.0]).below["weight"] == (
        *(0, 0, 1),
        *(1, 2, 3),
    )


def test_nothing_left_has_no_share():
    net = _net()
    nn.init.zeros_(net[0].weight)
    found = weight_cdf(net, [0.1])
    assert found.layers["0.weight"] is None
    assert found.shares == found.layers["3.weight"]
    nn.init.zeros_(net[3].weight)
    assert weight_cdf(net, [0.1]).shares is None
    assert weight_cdf(net, [0.1], zeros=True).shares == (1.0,)


def test_refusals():
    net = _net()
    for sigmas in ([], [-0.1], [float("nan")], [float("inf")]):
        with pytest.raises(UsageError, match="sigmas are one or more finite numbers"):
            weight_cdf(net, sigmas)
    with pytest.raises(UnknownNameError, match=r'unknown layer "fc\.weight"'):
        weight_cdf(net, [0.1], targets=find_targets(nn.ModuleDict({"fc": nn.Linear(2, 2)})))
    net[3].weight.data[0, 0] = float("nan")
    with pytest.raises(DataError, match=r'"3\.weight" holds weights that are not finite'):
        weight_cdf(net, [0.1])
