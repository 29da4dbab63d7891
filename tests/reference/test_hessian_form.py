"""d^T H d against Hessians written out: of softmax regression in NumPy, and of a small network by torch.func."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

from secateur.analysis.hessian import hessian_form
from secateur.core.masks import Masks


def test_softmax_regression_in_numpy():
    # The logits are linear in the weights: H = mean of (diag(p) - p p^T) (x) x x^T, g = mean of (p - y) x^T.
    generator = np.random.default_rng(0)
    w, x, y = generator.normal(size=(3, 5)), generator.normal(size=(12, 5)), generator.integers(3, size=12)
    keep = generator.random((3, 5)) < 0.5
    d = np.where(keep, 0.0, w)
    logits = x @ w.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    whole = np.zeros((15, 15))
    for row, sample in zip(p, x, strict=True):
        whole += np.kron(np.diag(row) - np.outer(row, row), np.outer(sample, sample)) / len(x)
    gradient = (p - np.eye(3)[y]).T @ x / len(x)
    net = nn.Linear(5, 3, bias=False).double()
    net.weight.data = torch.tensor(w)
    batches = [(torch.tensor(x[:7]), torch.tensor(y[:7])), (torch.tensor(x[7:]), torch.tensor(y[7:]))]
    found = hessian_form(net, batches, Masks({"weight": torch.tensor(keep)}))
    assert found.value == pytest.approx(d.ravel() @ whole @ d.ravel())
    assert found.slope == pytest.approx((gradient * d).sum())
    assert found.loss_change == pytest.approx(0.5 * found.value - found.slope)


def test_a_network_against_its_whole_hessian():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).double()
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randint(2, (9,))
    names = ["0.weight", "2.weight"]
    own = {name: net.get_parameter(name).detach() for name in names}
    masks = Masks({name: torch.rand(value.shape) < 0.5 for name, value in own.items()})

    def loss(values):
        return nn.functional.cross_entropy(functional_call(net, values, (x,)), y)

    blocks = hessian(loss)(own)
    d = {name: own[name].masked_fill(masks[name], 0.0).flatten() for name in names}
    pairs = {
        (a, b): float(d[a] @ blocks[a][b].detach().reshape(d[a].numel(), d[b].numel()) @ d[b])
        for a in names
        for b in names
    }
    found = hessian_form(net, [(x, y)], masks, pairs=True)
    assert found.pairs == pytest.approx(pairs)
    assert found.value == pytest.approx(sum(pairs.values()))
