"""Feature variance: worked numbers, an independent computation, cancellation, nothing left behind, refusals."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from secateur.analysis.feature_variance import FeatureVariance, feature_variance, variance_ratio
from secateur.core.targets import find_targets
from secateur.errors import DataError, UnknownNameError, UsageError
from secateur.testing.snapshots import generators, same_structure, same_values, structure, values
from secateur.variants import NoisyPrune, Workbench


def _conv(scale=1.0):
    layer = nn.Conv2d(2, 2, 1, bias=False)
    layer.weight.data = scale * torch.eye(2)[:, :, None, None]
    return nn.Sequential(layer)


def _net():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3, groups=2)),
        *(nn.Flatten(), nn.Linear(24, 5), nn.ReLU(), nn.Linear(5, 3)),
    )
    nn.init.normal_(net[1].running_mean)
    return net


def _batches(sizes=(7, 4, 5)):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 6, 6, generator=generator), torch.zeros(n, dtype=torch.long)) for n in sizes]


def _by_hooks(net, batches):
    """As the authors compute it: hooks, an unbiased variance per channel, a sum, a mean over batches."""
    found: dict[str, list[float]] = {}

    def hook(name):
        def keep(module, inputs, output):
            rows = output.detach().double().numpy()
            rows = np.moveaxis(rows, 1, -1).reshape(-1, rows.shape[1])
            found.setdefault(f"{name}.weight", []).append(rows.var(axis=0, ddof=1).sum())

        return keep

    net = copy.deepcopy(net).eval()
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        for inputs, _ in batches:
            net(inputs)
    return {name: float(np.mean(several)) for name, several in found.items()}


def test_e3_worked_numbers():
    x = torch.tensor([[[[1.0, 2.0]], [[0.0, 4.0]]], [[[3.0, 4.0]], [[0.0, 0.0]]]])
    channels = x.numpy().transpose(1, 0, 2, 3).reshape(2, -1)
    expected = channels.var(axis=1, ddof=1)
    assert expected == pytest.approx([1.666667, 4.0], abs=1e-6)
    dense, doubled = feature_variance(_conv(), [x]), feature_variance(_conv(2.0), [x])
    assert dense.layers["0.weight"] == pytest.approx(5.666667, abs=1e-6)
    assert dense.samples == 2
    assert variance_ratio(dense, doubled).layers["0.weight"] == pytest.approx(0.25)
    linear = nn.Sequential(nn.Linear(2, 2, bias=False))
    linear[0].weight.data = torch.eye(2)
    assert feature_variance(linear, [torch.tensor([[1.0, 2.0], [3.0, 6.0]])]).layers["0.weight"] == pytest.approx(10.0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_what_hooks_find(layout):
    net, batches = _net(), _batches()
    expected = _by_hooks(net, batches)
    batches = [(x.contiguous(memory_format=layout), y) for x, y in batches]
    found = feature_variance(net.to(memory_format=layout), batches)
    assert found.samples == 16
    assert found.layers == pytest.approx(expected, rel=1e-5)


def test_several_positions_of_a_linear_layer_and_half_precision():
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 4), torch.randn(5, 7, 6)
    with torch.no_grad():
        expected = layer(x).reshape(-1, 4).double().var(0).sum()
        half = copy.deepcopy(layer).bfloat16()(x.bfloat16()).reshape(-1, 4).double().var(0).sum()
    assert feature_variance(layer, [x]).layers["weight"] == pytest.approx(float(expected), rel=1e-5)
    found = feature_variance(copy.deepcopy(layer).bfloat16(), [x.bfloat16()]).layers["weight"]
    assert found == pytest.approx(float(half), rel=1e-4)


def test_a_large_mean_cancels_nothing():
    """Outputs of a mean 3000 times their deviation, in float32, more than one piece of them."""
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 4, 1)
    nn.init.constant_(layer.weight, 1.0)
    layer.bias.data = torch.tensor([3000.0, -3000.0, 0.0, 3000.0])
    x = torch.randn(9, 1, 256, 256)
    with torch.no_grad():
        rows = layer(x).double().numpy().transpose(1, 0, 2, 3).reshape(4, -1)
    assert feature_variance(layer, [x]).layers["weight"] == pytest.approx(rows.var(axis=1, ddof=1).sum(), rel=1e-5)


def test_outputs_that_do_not_vary_have_no_ratio():
    net, batches = _net(), _batches()
    pruned = copy.deepcopy(net)
    nn.init.zeros_(pruned[3].weight)
    nn.init.constant_(pruned[3].bias, 0.1)
    dead, alive = feature_variance(pruned, batches), feature_variance(net, batches)
    assert dead.layers["3.weight"] == 0.0
    assert variance_ratio(dead, alive).layers["3.weight"] == 0.0
    reverse = variance_ratio(alive, dead)
    assert reverse.layers["3.weight"] is None
    assert reverse.layers["0.weight"] == 1.0
    assert reverse.mean is not None
    assert reverse.mean == pytest.approx(np.mean([r for r in reverse.layers.values() if r is not None]))


def test_several_networks_are_averaged_first():
    pruned = [FeatureVariance({"a": 1.0}, 4), FeatureVariance({"a": 2.0}, 4)]
    noisy = [FeatureVariance({"a": 4.0}, 4), FeatureVariance({"a": 2.0}, 4)]
    assert variance_ratio(pruned, noisy).mean == pytest.approx(0.5)
    assert variance_ratio(FeatureVariance({"a": 1.0}, 4), FeatureVariance({"a": 0.0}, 4)).mean is None


def test_the_network_comes_back():
    net, batches = _net().train(), _batches()
    net[1].eval()
    net[3].weight.requires_grad_(False)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    shape, state, before = structure(net), copy.deepcopy(values(net)), generators()
    feature_variance(net, batches)
    with pytest.raises(RuntimeError):
        feature_variance(net, [torch.zeros(2, 4, 6, 6)])
    same_structure("after", shape, structure(net))
    same_values("after", state, values(net))
    assert before == generators()


def test_e5_noise_adds_its_variance_and_none_changes_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(300, 300, bias=False), nn.ReLU(), nn.Linear(300, 2))
    bench, x = Workbench(net), torch.randn(20, 300)
    sigma, own = 0.05, net[0].weight.detach().double().var()
    with bench.variant(NoisyPrune(sigma, 0.0, seed=1)):
        found = net[0].weight.detach().double().var()
    # The sample variance of 90,000 weights has a standard error of 0.5 %.
    assert float(found) == pytest.approx(float(own) + sigma**2, rel=0.025)
    several = []
    for seed in (0, 7):
        with bench.variant(NoisyPrune(0.0, 0.7, seed=seed)) as model:
            several.append(feature_variance(model, [x]))
    assert several[0] == several[1]


def test_refusals():
    net, batches = _net(), _batches()
    with pytest.raises(DataError, match="empty"):
        feature_variance(net, [])
    with pytest.raises(UnknownNameError, match=r'unknown layer "fc\.weight"'):
        feature_variance(net, batches, targets=find_targets(nn.ModuleDict({"fc": nn.Linear(2, 2)})))
    with pytest.raises(DataError, match=r'one value of each channel of "5\.weight"'):
        feature_variance(net, _batches((1,)))
    with pytest.raises(DataError, match="not finite"):
        feature_variance(net, [torch.full((2, 3, 6, 6), math.inf)])
    unused = nn.ModuleDict({"fc": nn.Linear(2, 2)})
    unused.forward = lambda x: x
    with pytest.raises(UsageError, match=r'"fc\.weight" was not used'):
        feature_variance(unused, [torch.zeros(2, 2)])
    one = FeatureVariance({"a": 1.0}, 1)
    with pytest.raises(UsageError, match=r'"a" is on one side only'):
        variance_ratio(one, FeatureVariance({"b": 1.0}, 1))
    with pytest.raises(UsageError, match="dense is empty"):
        variance_ratio(one, [])
    with pytest.raises(UsageError, match="different layers"):
        variance_ratio([one, FeatureVariance({"b": 1.0}, 1)], one)


def test_a_single_sample_at_the_end_counts_where_it_has_a_variance():
    net, batches = _net(), _batches((6, 1))
    found, whole = feature_variance(net, batches), feature_variance(net, batches[:1])
    assert found.layers["5.weight"] == whole.layers["5.weight"]
    assert found.layers["0.weight"] != whole.layers["0.weight"]
