"""Layers whose kept weights are on no path."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from secateur.analysis.connectivity import disconnected_layers
from secateur.core.masks import Masks
from secateur.core.targets import find_targets
from secateur.errors import UnknownNameError, UsageError
from secateur.testing.networks import convolutional
from secateur.testing.snapshots import same_structure, same_values, structure, values


def _deep():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.GELU()),
        nn.Linear(4, 2),
    )


def _by_paths(masks):
    """Layers of a chain none of whose kept weights has a way in and a way out, by Boolean products."""
    several = [m.numpy() for m in masks.values()]
    found = []
    for i, (name, own) in enumerate(zip(masks, several, strict=True)):
        reached, read = np.ones(several[0].shape[1], bool), np.ones(several[-1].shape[0], bool)
        for before in several[:i]:
            reached = (before & reached).any(axis=1)
        for after in reversed(several[i + 1 :]):
            read = (after & read[:, None]).any(axis=0)
        if own.any() and not (own & reached & read[:, None]).any():
            found.append(name)
    return found


def test_it_finds_what_boolean_products_find():
    net, some = _deep(), 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        masks = Masks({t.name: torch.tensor(generator.random(t.shape) < 0.2) for t in find_targets(net)})
        found = [c.layer for c in disconnected_layers(net, masks, torch.zeros(5, 3))]
        assert found == _by_paths(masks)
        some += bool(found)
    assert 5 < some < 40


def test_a_residual_network_with_a_way_around():
    net = convolutional()
    masks = {t.name: torch.ones(t.shape, dtype=torch.bool) for t in find_targets(net)}
    inputs = torch.zeros(2, 3, 6, 6)
    assert disconnected_layers(net, Masks(masks), inputs) == []
    masks["depthwise.weight"] = torch.zeros_like(masks["depthwise.weight"])
    found = disconnected_layers(net, Masks(masks), inputs)
    assert [(c.layer, c.reason) for c in found] == [("grouped.weight", "disconnected")]
    assert found[0].kept == found[0].total


def test_the_network_comes_back():
    net = convolutional().train()
    shape, state = structure(net), copy.deepcopy(values(net))
    masks = Masks({t.name: torch.ones(t.shape, dtype=torch.bool) for t in find_targets(net)})
    with torch.no_grad():
        disconnected_layers(net, masks, torch.zeros(2, 3, 6, 6))
    same_structure("after", shape, structure(net))
    same_values("after", state, values(net))


def test_refusals():
    net, inputs = _deep(), torch.zeros(2, 3)
    with pytest.raises(UnknownNameError, match="unknown masked parameter"):
        disconnected_layers(net, Masks({"9.weight": torch.ones(1, dtype=torch.bool)}), inputs)
    with pytest.raises(UsageError, match=r"shape \[1\]"):
        disconnected_layers(net, Masks({"0.weight": torch.ones(1, dtype=torch.bool)}), inputs)
    masks = Masks({"0.weight": torch.ones(4, 3, dtype=torch.bool)})
    with pytest.raises(UsageError, match="one float tensor"):
        disconnected_layers(net, masks, torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(UsageError, match=r'through "1" \(LayerNorm\)'):
        disconnected_layers(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), masks, inputs)
    closed = copy.deepcopy(net)
    nn.init.zeros_(closed[7].weight)
    with pytest.raises(UsageError, match=r'nothing passes "0\.weight" even with nothing masked'):
        disconnected_layers(closed, masks, inputs)
