"""Factors in a layer's weight and bias, or in its output: the same network, gradients included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur.core.targets import find_targets
from secateur.regularizers.l0 import L0
from secateur.regularizers.mask_pool import MaskPoolDropout
from secateur.regularizers.substitute import multiply_units, substitute
from secateur.regularizers.unit_sites import own_site

LAYERS = {
    "linear": (lambda: nn.Linear(3, 5), (3,)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (4, 3, 2)),
    "no bias": (lambda: nn.Conv1d(3, 5, 2, bias=False), (3, 6)),
}


def _run(layer, x, factor, after=None):
    layer.zero_grad()
    factor.grad = None
    out = layer(x) if after is None else after(layer(x))
    out.square().sum().backward()
    return out, factor.grad, [p.grad for p in layer.parameters()]


@pytest.mark.parametrize("samples", [1, 40], ids=["in the output", "in the weight"])
@pytest.mark.parametrize("kind", LAYERS)
def test_units_are_multiplied_wherever_that_is_done(kind, samples):
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make().double()
    twin, x = copy.deepcopy(layer), torch.randn(samples, *shape, dtype=torch.float64)
    (target,) = find_targets(layer)
    axis = own_site(target).axis
    factor = torch.rand(target.units, dtype=torch.float64, requires_grad=True)
    by_hand = factor.detach().clone().requires_grad_()
    multiply_units(layer, target, axis, lambda module: factor)
    own, during = [layer.weight, layer.bias], []
    layer.register_forward_pre_hook(lambda *_: during.append(layer.weight is own[0]))
    found = _run(layer, x, factor)
    shaped = by_hand.reshape(-1, *[1] * (-axis - 1))
    expected = _run(twin, x, by_hand, lambda y: y * shaped)
    torch.testing.assert_close(found, expected)
    assert during == [samples == 1]
    assert layer.weight is own[0]
    assert layer.bias is own[1]


def test_the_smaller_side_is_multiplied():
    layer, made = nn.Linear(8, 4), []
    (target,) = find_targets(layer)

    def factor(module):
        made.append(isinstance(module._parameters["weight"], nn.Parameter))
        return torch.full((4,), 2.0)

    plain = layer.weight.detach().clone()
    inside = []
    multiply_units(layer, target, -1, factor)
    layer.register_forward_pre_hook(lambda module, _: inside.append(module.weight.detach().clone()))
    layer(torch.randn(3, 8))
    assert torch.equal(inside[-1], plain)
    layer(torch.randn(30, 8))
    assert torch.equal(inside[-1], 2 * plain)
    assert torch.equal(layer.weight, plain)
    assert len(made) == 2


def test_the_own_weight_is_back_after_a_failure():
    layer = nn.Linear(3, 2)
    own = layer.weight
    substitute(layer, lambda module, x: {"weight": module.weight * 2})
    with pytest.raises(RuntimeError):
        layer(torch.randn(4, 7))
    assert layer.weight is own
    torch.testing.assert_close(layer(torch.ones(1, 3)), torch.ones(1, 3) @ (2 * own.T) + layer.bias)


def test_a_layer_of_batchnorm_without_scale_is_multiplied_in_its_output():
    network = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3, affine=False)).train()
    twin = copy.deepcopy(network)
    (target,) = find_targets(network)
    factor = torch.tensor([0.0, 1.0, 2.0])
    multiply_units(network[1], target, 1, lambda module: factor)
    x = torch.randn(4, 1, 5, 5)
    torch.testing.assert_close(network(x), twin(x) * factor[:, None, None])


def test_it_stays_in_one_compiled_graph():
    layer = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    twin = copy.deepcopy(layer)
    (target,) = find_targets(layer)
    factor = torch.rand(3, requires_grad=True)
    multiply_units(layer[0], target, -1, lambda module: factor)
    x = torch.randn(50, 4)
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out, torch.relu(twin[0](x) * factor))
    out.sum().backward()
    assert factor.grad is not None
    assert isinstance(layer[0].weight, nn.Parameter)


@pytest.mark.parametrize("spec", [L0(granularity="weight"), L0(), MaskPoolDropout()])
def test_an_interrupt_within_a_layer_leaves_it_its_own_parameters(spec):
    def interrupt(*_):
        raise KeyboardInterrupt

    network = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).train()
    own = dict(network[0]._parameters)
    attached = spec.attach(network)
    # So that the layer's hooks are there.
    network(torch.randn(40, 6))
    attached.end()
    handle = network[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        network(torch.randn(40, 6))
    assert network[0]._parameters["weight"] is not own["weight"]
    handle.remove()
    network(torch.randn(40, 6))
    assert network[0]._parameters["weight"] is own["weight"]
    handle = network[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        network(torch.randn(40, 6))
    attached.remove()
    assert all(network[0]._parameters[name] is parameter for name, parameter in own.items())
