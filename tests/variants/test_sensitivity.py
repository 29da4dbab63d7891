"""Sensitivity: what each layer alone is worth, paired with the dense network; nothing left behind; refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from secateur.core.statistics import paired_examples
from secateur.errors import DataError, UnknownNameError, UsageError
from secateur.testing.snapshots import same_structure, same_values, structure, values
from secateur.variants import Workbench
from secateur.variants.sensitivity import sensitivity

SPARSITIES = [0.9, 0.0, 0.5]


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def _batches(sizes=(40, 21)):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes]


def _right(net, batches):
    with torch.no_grad():
        return np.concatenate([(net.eval()(x).argmax(1) == y).numpy() for x, y in batches])


def _pruned(net, name, sparsity):
    """The int(sparsity n) smallest weights of one layer removed, by NumPy."""
    net = copy.deepcopy(net)
    weight = net.get_parameter(name).detach().numpy()
    flat = weight.ravel()
    flat[np.argsort(np.abs(flat), kind="stable")[: int(sparsity * flat.size + 1e-9)]] = 0.0
    return net


def test_each_layer_is_pruned_alone_and_compared_with_the_dense_network():
    net, batches = _net(), _batches()
    found = sensitivity(Workbench(net), iter(batches), SPARSITIES)
    dense = _right(copy.deepcopy(net), batches)
    assert found.dense == dense.mean()
    assert list(found.layers) == ["0.weight", "3.weight"]
    for name, steps in found.layers.items():
        assert [step.sparsity for step in steps] == SPARSITIES
        for step in steps:
            right = _right(_pruned(net, name, step.sparsity), batches)
            assert step.mean == right.mean()
            assert step.difference == paired_examples(right, dense)
    assert found.layers["0.weight"][1].difference.mean == 0.0
    assert any(step.mean != found.dense for step in found.layers["0.weight"])
    # Sparsity 0 of the first layer is the dense network itself: 2 x 3 variants, all on 61 examples.
    assert found.cost.examples == 6 * 61
    rows = found.rows()
    assert len(rows) == 6
    assert rows[0]["layer"] == "0.weight"
    assert rows[0]["difference"] == pytest.approx(rows[0]["mean"] - found.dense)


def test_layers_scores_and_the_journal(tmp_path):
    net, batches = _net(), _batches()

    def negative_loss(outputs, labels):
        return -nn.functional.cross_entropy(outputs, labels, reduction="none")

    options = {"layers": ["3"], "score": negative_loss, "journal": tmp_path / "run.jsonl"}
    found = sensitivity(Workbench(net), batches, [0.5], **options)
    again = sensitivity(Workbench(net), batches, [0.5], **options)
    assert list(found.layers) == ["3.weight"]
    assert found.dense < 0
    assert again.layers == found.layers
    assert again.cost.examples == 0


def test_the_network_comes_back():
    net = _net().train()
    net[3].weight.grad = torch.ones_like(net[3].weight)
    shape, state = structure(net), copy.deepcopy(values(net))
    sensitivity(Workbench(net), _batches(), SPARSITIES)
    same_structure("after", shape, structure(net))
    same_values("after", state, values(net))


def test_refusals():
    bench, batches = Workbench(_net()), _batches()
    with pytest.raises(UsageError, match="no sparsities"):
        sensitivity(bench, batches, [])
    with pytest.raises(UsageError, match="sparsity is a number in"):
        sensitivity(bench, batches, [1.0])
    with pytest.raises(UnknownNameError, match='unknown layer "7"'):
        sensitivity(bench, batches, [0.5], layers=["7"])
    with pytest.raises(UsageError, match="layers is empty"):
        sensitivity(bench, batches, [0.5], layers=[])
    with pytest.raises(DataError, match="empty"):
        sensitivity(bench, [], [0.5])
    with pytest.raises(UsageError, match="labels"):
        sensitivity(bench, [batches[0][0]], [0.5])
    with pytest.raises(DataError, match="not a number"):
        sensitivity(bench, [(batches[0][0] * torch.nan, batches[0][1])], [0.5], score=lambda o, y: o[:, 0])
