"""Large layers under noise of units: multiplied while they run, exactly, without another weight."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.regularizers import noisy_weight
from secateur.regularizers.base import WeightNoise
from secateur.regularizers.dropout import Dropout
from secateur.regularizers.targeted_dropout import TargetedDropout


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
            # Nothing but the layer itself sees another weight.
            assert torch.equal(layer[0].weight, plain)
            found.sin().sum().backward()
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(x.grad, y.grad)
            torch.testing.assert_close(layer[0].weight.grad, twin[0].weight.grad * by["0.weight"])
            if layer[0].bias is not None:
                torch.testing.assert_close(layer[0].bias.grad, twin[0].bias.grad)
            attached.after_step(Progress(1, 10, 10))
        assert attached._running.keys() == {"0.weight"}
    assert not layer[0]._forward_hooks
    assert not layer[0]._forward_pre_hooks
    assert layer[0].weight._backward_hooks is None


def test_the_unit_that_is_dropped_puts_out_its_bias_whatever_comes_in():
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
        network(torch.randn(2, 64)).sum().backward()
        attached.after_step(Progress(1, 10, 10))
        attached.begin((), {})
        attached._used = True
        with torch.no_grad(), _Largest() as made:
            network[2](network[1](network[0](torch.randn(2, 64))))
        assert made.numbers == 2 * 64
        assert all(slot._noisy is None for slot in attached._slots)
        attached.end()


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.free = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        # A look at its type is no use of it.
        x = self.free(x.to(self.free.weight.dtype))
        return F.linear(self.layer(x), self.layer.weight)


class Uncalled(Functional):
    def forward(self, x):
        return F.linear(self.free(x), self.layer.weight, self.layer.bias)


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2.0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other, self.free = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.other.weight = self.layer.weight

    def forward(self, x):
        return self.other(self.layer(self.free(x)))


class NotInEval(Functional):
    def forward(self, x):
        if not self.training:
            raise RuntimeError("not now")
        return self.layer(self.free(x))


ELSEWHERE: dict[str, tuple[Any, set[str]]] = {
    "a function": (Functional, {"free.weight"}),
    "not called": (Uncalled, {"free.weight"}),
    "a forward of its own": (lambda: nn.Sequential(Odd(12, 12), nn.Linear(12, 12)), {"1.weight"}),
    "tied": (Tied, {"free.weight"}),
    "no pass in eval mode": (NotInEval, set()),
    "attention": (
        lambda: nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0),
        {"linear1.weight", "linear2.weight"},
    ),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
def test_weights_that_are_read_elsewhere_are_multiplied_themselves(kind):
    torch.manual_seed(0)
    make, running = ELSEWHERE[kind]
    network = make().train()
    x, spec = torch.randn(3, 12), Fixed()
    twin = _weights(spec, network)
    expected = twin(x)
    expected.sin().sum().backward()
    multipliers = {t.name: spec.weights(t).float() for t in find_targets(network)}
    with spec.attach(network) as attached:
        found = network(x)
        found.sin().sum().backward()
        assert attached._running.keys() == running
    torch.testing.assert_close(found, expected)
    for name, by in multipliers.items():
        torch.testing.assert_close(network.get_parameter(name).grad, twin.get_parameter(name).grad * by)


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
        # The draw is over with the step.
        attached.after_step(Progress(1, 10, 10))
        assert torch.equal(network[1](network[0](x)), plain)


def test_passes_that_share_a_backward_pass_share_a_draw():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 60))
    x = torch.randn(4, 12)
    with Dropout(granularity="unit").attach(network):
        one, two = network(x), network(x)
        assert torch.equal(one, two)
        (one + two).sum().backward()
        assert not torch.equal(network(x), one)


def test_a_layer_that_is_called_twice_and_computed_again_in_the_backward_pass():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 12)

        def forward(self, x):
            return checkpoint(lambda y: self.layer(self.layer(y).relu()), x, use_reentrant=False)

    torch.manual_seed(0)
    network, spec, x = Twice(), Fixed(), torch.randn(3, 12)
    twin = _weights(spec, network)
    twin(x).sin().sum().backward()
    with spec.attach(network) as attached:
        network(x).sin().sum().backward()
        assert attached._running.keys() == {"layer.weight"}
    (target,) = find_targets(network)
    torch.testing.assert_close(network.layer.weight.grad, twin.layer.weight.grad * spec.weights(target).float())


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
