"""Gradient flow: worked numbers, exact means over unequal batches, masks, nothing left behind, refusals."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from secateur.analysis.gradient_flow import gradient_flow
from secateur.core.masks import Masks
from secateur.core.targets import find_targets
from secateur.errors import DataError, NoEffectError, UnknownNameError, UsageError
from secateur.testing.snapshots import same_structure, same_values, structure, values

W1, W2, X, Y = np.array([[1.0, 2.0], [-1.0, 1.0]]), np.array([[1.0, -2.0]]), np.array([1.0, 1.0]), 1.0


def _half_square(outputs, labels):
    return 0.5 * (outputs - labels).square().mean()


def _worked(w1=W1, w2=W2):
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double()
    net[0].weight.data, net[1].weight.data = torch.tensor(w1), torch.tensor(w2)
    return net, [(torch.tensor(X)[None], torch.tensor([[Y]], dtype=torch.float64))]


def _gradients(w1, w2):
    """By hand: L = (f - y)^2 / 2, f = W2 W1 x."""
    residual = (w2 @ w1 @ X - Y)[0]
    return residual * np.outer(w2[0], X), residual * (w1 @ X)[None]


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def _batches(sizes=(5, 2, 9)):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes]


def test_f1_worked_numbers():
    net, batches = _worked()
    g1, g2 = _gradients(W1, W2)
    assert g1.tolist() == [[2.0, 2.0], [-4.0, -4.0]]
    assert g2.tolist() == [[6.0, 0.0]]
    found = gradient_flow(net, batches, loss=_half_square)
    assert found.norm == pytest.approx(8.717798, abs=1e-6)
    assert found.norm == pytest.approx(math.sqrt((g1**2).sum() + (g2**2).sum()))
    assert found.layers == pytest.approx({"0.weight": math.sqrt(40), "1.weight": 6.0})
    assert found.weights == 6
    masks = Masks({"0.weight": torch.tensor([[False, True], [True, True]])})
    without = gradient_flow(net, batches, loss=_half_square, masked=masks)
    assert without.norm == pytest.approx(8.485281, abs=1e-6)
    assert without.weights == 5


def test_zeros_are_left_out_of_a_pruned_network_only_if_asked():
    w1 = W1 * np.array([[0.0, 1.0], [1.0, 1.0]])
    net, batches = _worked(w1)
    g1, g2 = _gradients(w1, W2)
    everything = gradient_flow(net, batches, loss=_half_square)
    kept = gradient_flow(net, batches, loss=_half_square, masked=True)
    assert everything.norm == pytest.approx(math.sqrt((g1**2).sum() + (g2**2).sum()))
    assert kept.norm == pytest.approx(math.sqrt((g1[w1 != 0] ** 2).sum() + (g2**2).sum()))
    assert kept.norm < everything.norm


def test_unequal_batches_are_one_mean_over_examples():
    net, batches = _net(), _batches()
    alone = copy.deepcopy(net).eval()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    nn.functional.cross_entropy(alone(x), y).backward()
    expected = {f"{i}.weight": float(alone[i].weight.grad.double().norm()) for i in (0, 4)}
    with torch.no_grad():
        found = gradient_flow(net, iter(batches))
    assert found.layers == pytest.approx(expected, rel=1e-5)
    assert found.norm == pytest.approx(math.hypot(*expected.values()), rel=1e-5)


def test_the_network_comes_back():
    net, batches = _net().train(), _batches()
    net[0].weight.requires_grad_(False)
    net[4].weight.grad = torch.ones_like(net[4].weight)
    shape, state = structure(net), copy.deepcopy(values(net))
    frozen = gradient_flow(net, batches)
    assert frozen.layers["0.weight"] > 0
    with pytest.raises(RuntimeError):
        gradient_flow(net, [(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long))])
    same_structure("after", shape, structure(net))
    same_values("after", state, values(net))


def test_refusals():
    net, batches = _net(), _batches()
    with pytest.raises(DataError, match="empty"):
        gradient_flow(net, [])
    with pytest.raises(UsageError, match="need labels"):
        gradient_flow(net, [batches[0][0]])
    with pytest.raises(UnknownNameError, match=r'unknown layer "fc\.weight"'):
        gradient_flow(net, batches, targets=find_targets(nn.ModuleDict({"fc": nn.Linear(2, 2)})))
    with pytest.raises(DataError, match="loss is nan"):
        gradient_flow(net, [(torch.full((2, 6), math.nan), torch.zeros(2, dtype=torch.long))])
    # The root has no finite slope at zero.
    with pytest.raises(DataError, match=r'gradient of "0\.weight" is not finite'):
        gradient_flow(net, batches, loss=lambda outputs, labels: (outputs * 0.0).sum().sqrt())
    with pytest.raises(UsageError, match=r"shape \[2\], expected \[8, 6\]"):
        gradient_flow(net, batches, masked=Masks({"0.weight": torch.tensor([True, False])}))
    with pytest.raises(UnknownNameError, match="masked parameter"):
        gradient_flow(net, batches, masked=Masks({"9.weight": torch.tensor([True])}))
    with pytest.raises(NoEffectError, match="cover none of the targets"):
        gradient_flow(net, batches, masked=Masks({"1.weight": torch.ones(8, dtype=torch.bool)}))
