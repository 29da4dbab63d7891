"""Large layers under noise of units: multiplied while they run, exactly, without another weight."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.errors import UsageError
from secateur.regularizers import noisy_weight, weight_swap
from secateur.regularizers.base import WeightNoise
from secateur.regularizers.dropout import Dropout
from secateur.regularizers.targeted_dropout import TargetedDropout
from secateur.regularizers.watch import can_watch


@pytest.fixture(autouse=True)
def every_layer_is_large(monkeypatch):
    monkeypatch.setattr(noisy_weight, "SMALL", 0)


@dataclass(frozen=True)
class Fixed(WeightNoise):
    """One number a unit, the same in every draw."""

    factor: float = 1.0
    bools: bool = True

    def numbers(self, target):
        kept = torch.arange(target.units) % 3 != 1
        return kept if self.bools else kept * torch.linspace(0.5, 2.0, target.units)

    def weights(self, target):
        """What it multiplies the target's weight by, in double precision."""
        return target.spread(self.numbers(target).double() * self.factor)

    def multiplier(self, target, weight, stream, progress):
        made = target.spread(self.numbers(target))
        return (made, self.factor) if self.bools else made


def _weights(spec: Fixed, model: nn.Module) -> nn.Module:
    """A copy whose weights are multiplied."""
    twin = copy.deepcopy(model)
    for target in find_targets(twin):
        with torch.no_grad():
            twin.get_parameter(target.name).mul_(spec.weights(target))
    return twin


LAYERS = {
    "linear, few rows": (lambda: nn.Linear(12, 6), (4, 12)),
    "linear, many rows": (lambda: nn.Linear(12, 6), (40, 12)),
    "linear, a sequence": (lambda: nn.Linear(12, 6), (2, 3, 12)),
    "linear, one example": (lambda: nn.Linear(12, 6), (12,)),
    "linear, no bias": (lambda: nn.Linear(12, 6, bias=False), (4, 12)),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3), (1, 8, 5)),
    "conv2d, few positions": (lambda: nn.Conv2d(8, 6, 3), (1, 8, 4, 4)),
    "conv2d, many positions": (lambda: nn.Conv2d(2, 6, 3, padding=1, padding_mode="circular"), (5, 2, 9, 9)),
    "conv2d, groups": (lambda: nn.Conv2d(8, 6, 3, groups=2), (1, 8, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (1, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("spec", [Fixed(), Fixed(factor=1.3), Fixed(bools=False)], ids=["bools", "factor", "numbers"])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_and_gradients_are_those_of_multiplied_weights(kind, spec):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = nn.Sequential(make()).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    twin, y = _weights(spec, layer), x.detach().clone().requires_grad_()
    expected = twin(y)
    expected.sin().sum().backward()
    by = {t.name: spec.weights(t) for t in find_targets(layer)}
    plain = layer[0].weight.detach().clone()
    with spec.attach(layer) as attached:
        for _ in range(2):
            layer.zero_grad()
            x.grad = None
            found = layer(x)
            # Plain again, as soon as the forward pass is over.
            assert torch.equal(layer[0].weight, plain)
            found.sin().sum().backward()
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(x.grad, y.grad)
            torch.testing.assert_close(layer[0].weight.grad, twin[0].weight.grad * by["0.weight"])
            if layer[0].bias is not None:
                torch.testing.assert_close(layer[0].bias.grad, twin[0].bias.grad)
            attached.after_step(Progress(1, 10, 10))
        assert all(slot._noisy is None for slot in attached._slots)
    assert layer[0].weight._backward_hooks is None


def test_a_unit_that_is_dropped_puts_out_its_bias():
    layer = nn.Linear(12, 6)
    with torch.no_grad():
        layer.weight[1] = 1e30
    network = nn.Sequential(layer)
    with Fixed().attach(network):
        assert torch.equal(network(torch.ones(2, 12))[:, 1], layer.bias[1].expand(2))


class _Largest(TorchDispatchMode):
    """The most numbers in anything computed."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = ("t.", "transpose.", "view.", "detach.", "alias.")
        if isinstance(out, torch.Tensor) and not func.__name__.startswith(views):
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize("spec", [TargetedDropout(granularity="unit"), Dropout(granularity="unit")])
def test_no_tensor_as_large_as_the_weight_is_made_before_its_gradient(spec):
    network = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64))
    with spec.attach(network) as attached:
        # The draw looks at norms of the weights; the forward pass is what is asked about.
        network.register_forward_pre_hook(lambda *_: made.__enter__() and None)
        network.register_forward_hook(lambda *_: made.__exit__(None, None, None) and None, prepend=True)
        made = _Largest()
        network(torch.randn(2, 64)).sum().backward()
        assert made.numbers == 2 * 64
        assert all(slot._noisy is None for slot in attached._slots)


class Net(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        self.layer, self.free = nn.Linear(12, 12), nn.Linear(12, 12)
        self.own = forward

    def forward(self, x):
        return self.own(self, x)


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2.0


class Standardized(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Tied(Net):
    def __init__(self) -> None:
        super().__init__(lambda net, x: net.free(net.layer(x)))
        self.free.weight = self.layer.weight


class Product(torch.autograd.Function):
    """A linear layer that reads its weight again in its backward pass."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


def _twice(net, x):
    return net.layer(net.layer(x).relu())


def _half_frozen(net, x):
    with torch.no_grad():
        x = net.layer(x)
    return net.free(net.layer(x))


READ: dict[str, tuple[Any, bool]] = {
    "its layer": (lambda: Net(lambda net, x: net.free(net.layer(x))), False),
    "its layer, twice": (lambda: Net(_twice), False),
    "a function": (
        lambda: Net(lambda net, x: F.linear(net.free(x.to(net.layer.weight.dtype)), net.layer.weight)),
        False,
    ),
    "a function by name": (lambda: Net(lambda net, x: F.linear(input=x, weight=net.layer.weight, bias=None)), False),
    "its layer and a function": (lambda: Net(lambda net, x: F.linear(net.layer(x), net.layer.weight.t())), False),
    "a sum": (lambda: Net(lambda net, x: net.layer(x) + net.layer.weight.sum()), False),
    "a list": (lambda: Net(lambda net, x: x @ torch.cat([net.layer.weight, net.free.weight]).t()), False),
    "turned around": (lambda: Net(lambda net, x: x @ net.layer.weight.T + net.free(x)), False),
    "its data": (lambda: Net(lambda net, x: x @ net.layer.weight.data.t() + net.free(x)), True),
    "detached": (lambda: Net(lambda net, x: x @ net.layer.weight.detach().t() + net.free(x)), True),
    "without gradients": (lambda: Net(_half_frozen), True),
    "in training only": (
        lambda: Net(lambda net, x: F.linear(x, net.layer.weight) if net.training else net.layer(x)),
        False,
    ),
    "not in eval mode": (lambda: Net(lambda net, x: net.layer(x) if net.training else 1 / 0), False),
    "inputs changed in place": (lambda: Net(lambda net, x: net.layer(x.clone().sub_(0.5).mul_(2.0))), False),
    "a forward of its own": (lambda: nn.Sequential(Odd(12, 12), nn.Linear(12, 12)), False),
    "tied": (Tied, False),
    "attention": (lambda: nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0), False),
    "a standardized convolution": (
        lambda: nn.Sequential(nn.Unflatten(1, (3, 2, 2)), Standardized(3, 5, 2)),
        False,
    ),
    "an autograd function": (lambda: Net(lambda net, x: Product.apply(net.free(x), net.layer.weight)), True),
    "a checkpoint": (lambda: Net(lambda net, x: checkpoint(_twice, net, x, use_reentrant=False)), True),
    "a reentrant checkpoint": (
        lambda: Net(lambda net, x: checkpoint(_twice, net, net.free(x), use_reentrant=True)),
        True,
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_whoever_reads_a_weight_in_the_forward_pass_reads_the_product(kind):
    torch.manual_seed(0)
    make, exchanged = READ[kind]
    network, spec, x = make().train(), Fixed(factor=1.3), torch.randn(3, 12)
    twin = _weights(spec, network)
    expected = twin(x)
    expected.sin().sum().backward()
    multipliers = {t.name: spec.weights(t).float() for t in find_targets(network)}
    with spec.attach(network) as attached:
        for step in range(2):
            network.zero_grad()
            found = network(x)
            assert _get_current_function_mode() is None
            found.sin().sum().backward()
            torch.testing.assert_close(found, expected)
            for name, by in multipliers.items():
                gradient, plain = network.get_parameter(name).grad, twin.get_parameter(name).grad
                assert (gradient is None) == (plain is None)
                if gradient is not None:
                    torch.testing.assert_close(gradient, plain * by)
            attached.after_step(Progress(step + 1, 10, 10))
        assert bool(attached._running.unfit) == exchanged
        assert any(slot._noisy is not None for slot in attached._slots) == exchanged


@pytest.mark.parametrize("rows", [3, 40])
def test_hooks_of_others_see_the_noisy_output(rows):
    torch.manual_seed(0)
    network, spec, x = nn.Sequential(nn.Linear(12, 6)), Fixed(factor=1.3), torch.randn(rows, 12)
    network[0].register_forward_hook(lambda module, args, output: output.relu())
    expected = _weights(spec, network)(x)
    with spec.attach(network):
        torch.testing.assert_close(network(x), expected)


def test_an_interrupt_leaves_the_network_and_the_modes_as_they_were():
    def interrupt(*_):
        raise KeyboardInterrupt

    network = nn.Sequential(nn.Linear(12, 6), nn.ReLU())
    plain = copy.deepcopy(network.state_dict())
    attached = Fixed().attach(network)
    handle = network[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        network(torch.randn(2, 12))
    handle.remove()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in plain.items())
    attached.remove()
    assert _get_current_function_mode() is None
    assert isinstance(network[0].weight, nn.Parameter)


def test_what_the_forward_pass_writes_into_a_weight_is_not_lost_silently():
    def forward(net, x):
        net.layer.weight.detach().mul_(0.5)
        return net.layer(x)

    network = Net(forward)
    attached = Fixed().attach(network)
    network(torch.randn(3, 12)).sum().backward()
    with pytest.raises(UsageError, match="was written to between a training forward pass and the optimizer step"):
        attached.after_step(Progress(1, 10, 10))
    attached.remove()


def test_elsewhere_weights_are_exchanged(monkeypatch):
    """In networks that no mode can watch."""
    network, spec, x = nn.Sequential(nn.Linear(12, 6)), Fixed(), torch.randn(3, 12)
    expected = _weights(spec, network)(x)
    monkeypatch.setattr(weight_swap, "can_watch", lambda model: False)
    with spec.attach(network) as attached:
        torch.testing.assert_close(network(x), expected)
        assert attached._swapped
        assert not attached._running


def test_compiled_scripted_and_replicated_networks_cannot_be_watched():
    layer = nn.Sequential(nn.Linear(2, 2))
    assert can_watch(layer)
    assert not can_watch(torch.compile(layer))
    assert not can_watch(nn.DataParallel(layer))
    assert not can_watch(nn.Sequential(torch.jit.trace(layer, torch.ones(1, 2))))
    layer[0].compile()
    assert not can_watch(layer)


def test_an_evaluation_between_the_passes_sees_plain_layers():
    network = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 3))
    x = torch.randn(4, 12)
    plain = network(x).detach()
    with Fixed().attach(network) as attached:
        noisy = network(x)
        assert not torch.equal(noisy, plain)
        network.eval()
        with torch.no_grad():
            assert torch.equal(network(x), plain)
        assert torch.equal(network.state_dict()["0.weight"], network[0].weight)
        network.train()
        noisy.sum().backward()
        attached.after_step(Progress(1, 10, 10))


def test_passes_that_share_a_backward_pass_share_a_draw():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 60))
    x = torch.randn(4, 12)
    with Dropout(granularity="unit").attach(network):
        one, two = network(x), network(x)
        assert torch.equal(one, two)
        (one + two).sum().backward()
        assert not torch.equal(network(x), one)


def test_under_autocast_outputs_keep_their_type():
    network = nn.Sequential(nn.Linear(12, 6))
    x = torch.randn(2, 12)
    with Fixed(bools=False).attach(network), torch.autocast("cpu", torch.bfloat16):
        found = network(x)
        found.float().sum().backward()
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), _weights(Fixed(bools=False), network)(x), rtol=0.05, atol=0.05)


def test_noise_drawn_is_that_of_small_layers(monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 30), nn.ReLU(), nn.Linear(30, 12)).double()
    x, found = torch.randn(3, 12, dtype=torch.float64), []
    for small in (0, 10**6):
        monkeypatch.setattr(noisy_weight, "SMALL", small)
        with TargetedDropout(granularity="unit").attach(copy.deepcopy(network), seed=4) as attached:
            for step in range(3):
                found.append(attached.network(x))
                found[-1].sum().backward()
                attached.after_step(Progress(step + 1, 10, 10))
    for one, other in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(one, other)
