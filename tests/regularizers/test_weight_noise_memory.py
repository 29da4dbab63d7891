"""Weight noise holds one copy of the weights, and multiplies gradients in place only where nobody can tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.core.targets import find_targets
from secateur.errors import UsageError
from secateur.regularizers import noisy_weight, weight_swap
from secateur.regularizers.base import WeightNoise
from secateur.regularizers.dropout import Dropout
from secateur.regularizers.packed_mask import PackedMask
from secateur.regularizers.targeted_dropout import TargetedDropout

KEPT = torch.rand(9, 7, generator=torch.Generator().manual_seed(0)) < 0.5
FACTOR = 1.25


@dataclass(frozen=True)
class Fixed(WeightNoise):
    """The same multiplier in every draw."""

    made: Any = None

    def multiplier(self, target, weight, stream, progress):
        return self.made


FORMS = {
    "bools": (KEPT, KEPT.float()),
    "bools and a factor": ((KEPT, FACTOR), KEPT.float() * FACTOR),
    "numbers": (KEPT.float() * FACTOR, KEPT.float() * FACTOR),
    "bools for units": (KEPT[:, :1], KEPT[:, :1].float()),
    "bools for units, and a factor": ((KEPT[:, :1], FACTOR), KEPT[:, :1].float() * FACTOR),
}


@pytest.fixture(params=FORMS, ids=str)
def form(request):
    return FORMS[request.param]


@pytest.fixture(autouse=True, params=["as large", "as small"])
def size(request, monkeypatch):
    """Every test here on layers that are taken for large ones, and for small ones, and by exchanged weights."""
    monkeypatch.setattr(weight_swap, "can_watch", lambda model: False)
    if request.param == "as large":
        monkeypatch.setattr(noisy_weight, "SMALL", 0)
    return request.param


def _layer(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(7, 9), torch.randn(5, 7)


def _plain_gradient(layer, x, multiplier):
    """Of the loss at the multiplied weights, times the multiplier: what the hook has to make of it."""
    weight = (layer.weight.detach() * multiplier).requires_grad_()
    nn.functional.linear(x, weight, layer.bias).square().sum().backward()
    return weight.grad * multiplier


def _loss(layer, x):
    return layer(x).square().sum()


class Made(TorchDispatchMode):
    """What is computed, by name, with as many numbers as the weight has."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.numel and out.is_floating_point():
            self.names.append(func.overloadpacket.__name__)
        return out


def test_gradients_of_large_layers_are_multiplied_in_place(form, size):
    made, multiplier = form
    layer, x = _layer()
    expected = _plain_gradient(layer, x, multiplier)
    with Fixed(made).attach(layer):
        loss = _loss(layer, x)
        with Made(layer.weight.numel()) as seen:
            loss.backward()
    assert torch.equal(layer.weight.grad, expected)
    assert bool({"mul", "clone", "empty_like"} & set(seen.names)) == (size == "as small")


@pytest.mark.parametrize("spec", [TargetedDropout(), TargetedDropout(granularity="unit", draw="weight"), Dropout()])
def test_weight_level_methods_keep_bits_of_large_layers(spec, size):
    network = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.ConvTranspose1d(16, 4, 3))
    with spec.attach(network) as attachment:
        network[0](torch.randn(2, 16))
        attachment.begin((), {})
        for slot in attachment._slots:
            assert isinstance(slot._multiplier, PackedMask) == (size == "as large")
            if size == "as large":
                assert slot._multiplier._bits.nbytes == slot.target.numel // 8
        attachment.end()
        assert all(slot._multiplier is None for slot in attachment._slots)


def test_later_gradients_are_added_as_ever(form):
    made, multiplier = form
    layer, x = _layer()
    other = torch.randn(3, 7)
    one, two = _plain_gradient(layer, x, multiplier), _plain_gradient(layer, other, multiplier)
    with Fixed(made).attach(layer):
        # Two backward passes of one draw, and one of another.
        first, second = _loss(layer, x), _loss(layer, other)
        first.backward()
        second.backward()
        assert torch.equal(layer.weight.grad, one + two)
        _loss(layer, x).backward()
    assert torch.equal(layer.weight.grad, one + two + one)


def test_gradients_that_are_asked_for_are_multiplied(form):
    made, multiplier = form
    layer, x = _layer()
    expected = _plain_gradient(layer, x, multiplier)
    with Fixed(made).attach(layer):
        (found,) = torch.autograd.grad(_loss(layer, x), [layer.weight])
        assert torch.equal(found, expected)
        assert layer.weight.grad is None
        _loss(layer, x).backward(inputs=[layer.weight])
    assert torch.equal(layer.weight.grad, expected)


def test_each_pass_is_asked_for_itself(form):
    made, multiplier = form
    layer, x = _layer()
    expected = _plain_gradient(layer, x, multiplier)
    with Fixed(made).attach(layer):
        for _ in range(2):
            loss = _loss(layer, x)
            (found,) = torch.autograd.grad(loss, [layer.weight], retain_graph=True)
            layer.weight.grad = None
            loss.backward()
            assert torch.equal(found, expected)
            assert torch.equal(layer.weight.grad, expected)


def test_a_pass_within_a_pass_is_asked_for_itself(form):
    made, multiplier = form
    layer, x = _layer()
    inner, outer = _plain_gradient(layer, 2 * x, multiplier), _plain_gradient(layer, x, multiplier)

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        def backward(ctx, gradient):
            with torch.enable_grad():
                again = nn.functional.linear(2 * x, layer.weight, layer.bias).square().sum()
            (found,) = torch.autograd.grad(again, [layer.weight])
            assert torch.equal(found, inner)
            return gradient

    with Fixed(made).attach(layer):
        Asks.apply(layer(x)).square().sum().backward()
    assert torch.equal(layer.weight.grad, outer)


@pytest.mark.parametrize("kind", ["gradient", "accumulated, before", "accumulated, after"])
def test_other_hooks_see_the_multiplied_gradient(form, kind):
    made, multiplier = form
    layer, x = _layer()
    expected, seen = _plain_gradient(layer, x, multiplier), []

    def look(gradient):
        seen.append(gradient.clone())

    def look_at_grad(parameter):
        seen.append(parameter.grad.clone())

    if kind == "accumulated, before":
        layer.weight.register_post_accumulate_grad_hook(look_at_grad)
    with Fixed(made).attach(layer):
        if kind == "gradient":
            layer.weight.register_hook(look)
        if kind == "accumulated, after":
            layer.weight.register_post_accumulate_grad_hook(look_at_grad)
        _loss(layer, x).backward()
    assert torch.equal(seen[0], expected)
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda w, o: (w + o).sin().sum(),
        lambda w, o: (o + w).sin().sum(),
        lambda w, o: (w.view(-1) + o.view(-1)).sin().sum(),
        lambda w, o: torch.cat([o, w]).sin().sum(),
        lambda w, o: torch.stack([o, w]).sum(),
        lambda w, o: (w + o).sum(),
        lambda w, o: w.sum() + o.sum(),
    ],
)
def test_a_gradient_that_goes_to_others_too_is_left_to_them(form, use):
    made, multiplier = form

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(7, 9, bias=False), nn.Parameter(torch.randn(9, 7))

        def forward(self, x):
            return use(self.layer.weight, self.other)

    network = Sum()
    weight, other = network.layer.weight.detach() * multiplier, network.other.detach().clone()
    weight.requires_grad_()
    other.requires_grad_()
    use(weight, other).backward()
    with Fixed(made).attach(network):
        network(None).backward()
    assert torch.equal(network.layer.weight.grad, weight.grad * multiplier)
    assert torch.equal(network.other.grad, other.grad)


def test_memory_that_another_tensor_shares_is_not_written_to(form):
    made, multiplier = form
    layer, x = _layer()
    expected, kept = _plain_gradient(layer, x, multiplier), []

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.clone()

        @staticmethod
        def backward(ctx, gradient):
            copy = gradient.clone()
            kept.append(copy.view(-1))
            return copy

    layer.forward = lambda x: nn.functional.linear(x, Keeps.apply(layer.weight), layer.bias)
    with Fixed(made).attach(layer):
        _loss(layer, x).backward()
    assert torch.equal(layer.weight.grad, expected)
    assert not torch.equal(kept[0].view(9, 7), expected)


@pytest.mark.parametrize("missing", ["_will_engine_execute_node", "_storage_Use_Count"])
def test_without_torchs_inner_answers_the_gradient_is_the_same(form, missing, monkeypatch):
    made, multiplier = form
    layer, x = _layer()
    expected = _plain_gradient(layer, x, multiplier)
    monkeypatch.delattr(noisy_weight.torch._C, missing)
    with Fixed(made).attach(layer):
        _loss(layer, x).backward()
    assert torch.equal(layer.weight.grad, expected)


def test_a_kept_weight_that_is_zero_learns():
    layer, x = _layer()
    nn.init.zeros_(layer.weight)
    with Fixed(KEPT).attach(layer):
        _loss(layer, x).backward()
    assert torch.equal(layer.weight.grad != 0, KEPT)


def test_bools_and_numbers_are_the_same_noise():
    results = []
    for made in (KEPT, KEPT.float(), (KEPT, 2.0), KEPT.float() * 2.0):
        layer, x = _layer()
        with Fixed(made).attach(layer):
            loss = _loss(layer, x)
            loss.backward()
            results.append((loss.detach(), layer.weight.detach().clone(), layer.weight.grad))
    for one, other in ((0, 1), (2, 3)):
        assert all(torch.equal(a, b) for a, b in zip(results[one], results[other], strict=True))


def test_nothing_is_left_in_the_parameter():
    layer, x = _layer()
    with TargetedDropout().attach(layer):
        _loss(layer, x).backward()
    assert layer.weight._backward_hooks is None
    assert layer.weight._post_accumulate_grad_hooks is None
    layer.weight.register_post_accumulate_grad_hook(lambda p: None)
    TargetedDropout().attach(layer, find_targets(layer)).remove()
    assert len(layer.weight._post_accumulate_grad_hooks) == 1


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ((KEPT.float(), 2.0), r"returned torch.float32 and a float, expected bools \(True: kept\)"),
        ((KEPT, "2"), r"returned torch.bool and a str, expected bools \(True: kept\) and the number"),
        ((KEPT, float("nan")), "not finite"),
        ((KEPT, 1.0, 2.0), "returned a tuple, expected a tensor"),
    ],
)
def test_bools_with_something_else_are_refused(made, message):
    layer, x = _layer()
    before = layer.weight.detach().clone()
    with pytest.raises(UsageError, match=message), Fixed(made).attach(layer):
        layer(x)
    assert torch.equal(layer.weight, before)
