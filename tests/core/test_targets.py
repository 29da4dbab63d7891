"""What may be pruned, in what order, and its rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from secateur.core.targets import find_targets, unwrap
from secateur.errors import NoEffectError, UsageError

LAYERS = {
    "linear": lambda: nn.Linear(5, 4),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(3, 4, (3, 2), bias=False),
    "conv3d": lambda: nn.Conv3d(2, 4, 2),
    "grouped": lambda: nn.Conv2d(8, 12, 3, groups=4),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "transposed1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed2d": lambda: nn.ConvTranspose2d(3, 5, 2),
    "transposed3d": lambda: nn.ConvTranspose3d(2, 4, 2),
    "transposed_grouped": lambda: nn.ConvTranspose2d(6, 9, 2, groups=3),
}


def _one(name):
    layer = LAYERS[name]()
    (target,) = find_targets(nn.ModuleDict({"x": layer}))
    return layer, target


@pytest.mark.parametrize("name", LAYERS)
def test_rows_and_unrows_are_inverse(name):
    layer, target = _one(name)
    weight = torch.arange(layer.weight.numel()).reshape(layer.weight.shape)
    rows = target.rows(weight)
    assert rows.shape == (target.units, target.fan_in)
    assert torch.equal(target.unrows(rows), weight)
    assert torch.equal(target.rows(target.unrows(rows)), rows)
    assert target.units * target.fan_in == target.numel == weight.numel()


@pytest.mark.parametrize("name", LAYERS)
def test_a_row_is_exactly_what_makes_one_output_unit(name):
    """Zeroing a row (and its bias) silences that output channel and changes no other."""
    layer, target = _one(name)
    assert target.units == (layer.out_features if name == "linear" else layer.out_channels)
    torch.manual_seed(0)
    shape = (2, 5) if name == "linear" else (2, layer.in_channels, *[5] * (layer.weight.dim() - 2))
    x = torch.randn(shape)
    before = layer(x)
    unit = target.units - 2
    with torch.no_grad():
        rows = target.rows(layer.weight).clone()
        rows[unit] = 0
        layer.weight.copy_(target.unrows(rows))
        if target.bias is not None:
            layer.bias[unit] = 0
    after = layer(x)
    changed = [i for i in range(target.units) if not torch.equal(before[:, i], after[:, i])]
    assert changed == [unit]
    assert bool((after[:, unit] == 0).all())


@pytest.mark.parametrize("name", LAYERS)
def test_spread_gives_every_weight_its_units_value(name):
    _, target = _one(name)
    per_unit = torch.arange(1.0, target.units + 1)
    spread = target.spread(per_unit).expand(target.shape)
    assert torch.equal(target.rows(spread), per_unit[:, None].expand(-1, target.fan_in))


@given(
    groups=st.integers(1, 4),
    ins=st.integers(1, 3),
    outs=st.integers(1, 3),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    transposed=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_rows_for_any_convolution(groups, ins, outs, kernel, transposed):
    kinds = (
        [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]
        if transposed
        else [nn.Conv1d, nn.Conv2d, nn.Conv3d]
    )
    layer = kinds[len(kernel) - 1](groups * ins, groups * outs, tuple(kernel), groups=groups)
    (target,) = find_targets(layer)
    weight = layer.weight.detach()
    rows = target.rows(weight)
    assert rows.shape == (groups * outs, ins * torch.Size(kernel).numel())
    assert torch.equal(target.unrows(rows), weight)
    for unit in range(target.units):
        own = weight[unit] if not transposed else weight[(unit // outs) * ins :][:ins, unit % outs]
        assert torch.equal(rows[unit], own.reshape(-1))


def test_attention_projections():
    network = nn.Sequential(nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 4, kdim=6, vdim=5, bias=False))
    targets = find_targets(network)
    assert targets.names == [
        "0.in_proj_weight",
        "0.out_proj.weight",
        "1.q_proj_weight",
        "1.k_proj_weight",
        "1.v_proj_weight",
        "1.out_proj.weight",
    ]
    assert (targets["0.in_proj_weight"].blocks, targets["0.in_proj_weight"].units) == (6, 24)
    assert targets["0.in_proj_weight"].bias == "0.in_proj_bias"
    assert targets["1.k_proj_weight"].blocks == 4
    assert targets["1.k_proj_weight"].bias is None
    assert targets["0.out_proj.weight"].kind == "linear"


def test_tied_weights_count_once():
    network = nn.ModuleDict({"embedding": nn.Embedding(7, 4), "a": nn.Linear(4, 7), "b": nn.Linear(4, 7)})
    network["a"].weight = network["embedding"].weight
    network["b"].weight = network["embedding"].weight
    (target,) = find_targets(network)
    assert (target.name, target.aliases) == ("a.weight", ("b.weight",))
    targets = find_targets(network)
    assert targets["b.weight"] is targets["a.weight"]
    assert find_targets(network, exclude=[]).names == ["a.weight"]
    with pytest.raises(NoEffectError):
        find_targets(network, exclude=["b"])

    shared = nn.Linear(3, 3)
    assert find_targets(nn.Sequential(shared, nn.ReLU(), shared)).names == ["0.weight"]


def test_norms():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.LayerNorm(4), nn.BatchNorm1d(2)
    )
    targets = find_targets(network, kind="norm")
    assert targets.names == ["1.weight", "4.weight"]
    assert [t.units for t in targets] == [4, 2]
    assert [t.bias for t in targets] == ["1.bias", "4.bias"]


def test_patterns():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)), nn.Linear(4, 2))
    assert find_targets(network).names == ["0.weight", "1.0.weight", "1.1.weight", "2.weight"]
    assert find_targets(network, exclude=["@first", "@last"]).names == ["1.0.weight", "1.1.weight"]
    assert find_targets(network, include=["1.*"]).names == ["1.0.weight", "1.1.weight"]
    assert find_targets(network, include=["2", "0.weight"]).names == ["0.weight", "2.weight"]
    with pytest.raises(NoEffectError, match=r'"1\.2" matches no prunable layer; nearest: .*1\.1.*4 prunable'):
        find_targets(network, exclude=["1.2"])
    with pytest.raises(NoEffectError, match="no target left"):
        find_targets(network, exclude=["*"])
    with pytest.raises(NoEffectError, match="nothing to do"):
        find_targets(nn.ReLU())


def test_wrappers_are_looked_through():
    network = nn.Sequential(nn.Linear(3, 2))
    for wrapped in (torch.compile(network, backend="eager"), nn.DataParallel(network)):
        assert unwrap(wrapped) is network
        assert find_targets(wrapped).names == ["0.weight"]
        assert find_targets(wrapped).tensors(wrapped)["0.weight"] is network[0].weight


def test_a_parametrized_weight_is_refused_with_the_way_out():
    network = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)))
    with pytest.raises(UsageError, match=r'layer "0".*remove_parametrizations'):
        find_targets(network)


def test_a_bare_layer_is_a_model():
    (target,) = find_targets(nn.Linear(3, 2))
    assert (target.name, target.module, target.bias) == ("weight", "", "bias")
