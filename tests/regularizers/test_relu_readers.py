"""Gradients of units that ReLUs alone read: not multiplied again, and the same to the bit."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode
from torch.utils.checkpoint import checkpoint

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.lab.models import build_model
from secateur.regularizers import channel_noise
from secateur.regularizers.channel_noise import RankedChannelDropout
from secateur.regularizers.ddrop import DDrop


class Net(nn.Module):
    """`tail(BatchNorm's output)`, over a convolution."""

    def __init__(self, tail: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.tail = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), tail
        nn.init.normal_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.bn(self.conv(x)))


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class _Numbers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.numpy() * 2)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def _attached(model: nn.Module, **fields) -> RankedChannelDropout:
    spec = DDrop(keep_min=0.2, keep_max=0.8, **{"l1": 0.0, **fields})
    attached = spec.attach(model, find_targets(model, kind=spec.acts_on), seed=3)
    assert isinstance(attached, RankedChannelDropout)
    return attached


def _step(model: nn.Module, attached: RankedChannelDropout, x: Tensor, step: int, per_epoch: int = 100) -> Tensor:
    model.zero_grad()
    out = model(x)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
    attached.after_step(Progress(step, 1000, per_epoch))
    return out.detach()


def _found(model: nn.Module, **fields) -> frozenset[str]:
    with _attached(model.train(), **fields) as attached:
        _step(model, attached, torch.randn(4, 3, 8, 8), 1)
        return attached._found


ALONE = {
    "function": F.relu,
    "torch": torch.relu,
    "in place": lambda y: F.relu(y, inplace=True) + 1.0,
    "module": nn.ReLU(),
    "method": lambda y: y.relu(),
    "two": lambda y: y.relu() + F.relu(y),
    "a look": lambda y: F.relu(y).reshape(y.shape[0], -1, y.size(2), y.size(3)),
}
KEPT: list[Tensor] = []
NOT_ALONE = {
    "nothing": lambda y: y * 1.0,
    "another besides": lambda y: F.relu(y) + 0.1 * y,
    "an earlier one": lambda y: y.sum() + F.relu(y),
    "leaky": lambda y: F.leaky_relu(y, 0.1),
    "autograd function": lambda y: F.relu(y) + _Double.apply(y),
    "list": lambda y: F.relu(y) + torch.stack([y, y])[0],
    "detached": lambda y: F.relu(y) + y.detach(),
    "kept": lambda y: KEPT.append(y) or F.relu(y),
    "its numbers": lambda y: F.relu(y) + _Numbers.apply(y),
    "overwritten": lambda y: F.relu(y) + y.add_(1.0),
}


@pytest.mark.parametrize("tail", ALONE.values(), ids=ALONE.keys())
def test_found(tail) -> None:
    assert _found(Net(tail)) == {"bn.weight"}


@pytest.mark.parametrize("tail", NOT_ALONE.values(), ids=NOT_ALONE.keys())
def test_left_alone(tail) -> None:
    assert _found(Net(tail)) == frozenset()


def test_scaled_masks_are_always_multiplied() -> None:
    assert _found(Net(F.relu), rescale=True) == frozenset()
    assert _found(Net(F.relu), per_sample=False) == frozenset()


def test_the_networks_own_output_is_read_by_who_called_it() -> None:
    network = Net(lambda y: y)
    assert _found(network) == frozenset()


def test_a_hook_that_reads_the_output_counts() -> None:
    network, sums = Net(F.relu).train(), []
    with _attached(network) as attached:
        network.bn.register_forward_hook(lambda m, a, out: sums.append(out.abs().sum()))
        _step(network, attached, torch.randn(4, 3, 8, 8), 1)
        assert attached._found == frozenset()


@pytest.mark.parametrize("fields", [{}, {"scores": "weight_norm"}], ids=["gamma", "weight_norm"])
def test_gradients_and_outputs_are_those_of_products(fields: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = build_model("resnet20", num_classes=10, in_shape=(3, 16, 16)).train()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.weight)
    twin, batches = copy.deepcopy(network), torch.randn(3, 4, 3, 16, 16)
    seen = []
    for model, compiled in ((network, False), (twin, True)):
        # What is compiled is multiplied forward and backward.
        monkeypatch.setattr(channel_noise, "can_watch", lambda _, compiled=compiled: not compiled)
        with _attached(model, **fields) as attached:
            outputs = []
            for step, batch in enumerate(batches):
                outputs.append(_step(model, attached, batch, step + 1))
                outputs += [p.grad.clone() for p in model.parameters()]
            seen.append((outputs, attached._found))
    (ours, found), (products, none) = seen
    assert len(found) >= 10
    assert not none
    assert all(torch.equal(a, b) for a, b in zip(ours, products, strict=True))


def _gradients(tail, monkeypatch: pytest.MonkeyPatch, watched: bool) -> list[Tensor]:
    """Of three steps of a network with that tail, its masks multiplied once or twice."""
    monkeypatch.setattr(channel_noise, "can_watch", lambda _: watched)
    torch.manual_seed(0)
    network = Net(tail).train()
    seen: list[Tensor] = []
    with _attached(network) as attached:
        for step, x in enumerate(torch.randn(3, 4, 3, 8, 8)):
            _step(network, attached, x, step + 1)
            seen += [p.grad.clone() for p in network.parameters()]
    return seen


def _checkpointed(y: Tensor) -> Tensor:
    return checkpoint(lambda z: F.relu(z * 2.0), y, use_reentrant=False)


@pytest.mark.parametrize("tail", [*ALONE.values(), *NOT_ALONE.values(), _checkpointed])
def test_gradients_are_those_of_products_whoever_reads(tail, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, products = (_gradients(tail, monkeypatch, watched) for watched in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(ours, products, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_within_a_checkpoint(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Inside(Net):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    seen = []
    for watched in (True, False):
        monkeypatch.setattr(channel_noise, "can_watch", lambda _, watched=watched: watched)
        torch.manual_seed(0)
        network = Inside(F.relu).train()
        with _attached(network) as attached:
            for step in range(3):
                _step(network, attached, torch.randn(4, 3, 8, 8).requires_grad_(), step + 1)
                seen += [p.grad.clone() for p in network.parameters()]
            assert bool(attached._found) == watched
    half = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_what_sampling_reads_is_not_what_training_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Net(lambda y: F.relu(y) if network.training else F.relu(y) + 0.1 * y).train()
    with _attached(network) as attached:
        x = torch.randn(4, 3, 8, 8)
        _step(network, attached, x, 1)
        found = []
        for before in (attached._found, frozenset()):
            attached._found = before
            y = x.clone().requires_grad_()
            with attached.sampling(seed=1):
                network.eval()(y).sum().backward()
            found.append(y.grad)
        assert torch.equal(*found)


def test_looked_at_again_every_epoch() -> None:
    network = Net(F.relu).train()
    with _attached(network) as attached:
        x = torch.randn(4, 3, 8, 8)
        _step(network, attached, x, 1, per_epoch=2)
        assert attached._found == {"bn.weight"}
        network.tail = lambda y: F.relu(y) + y
        _step(network, attached, x, 2, per_epoch=2)
        _step(network, attached, x, 3, per_epoch=2)
        assert attached._found == frozenset()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_no_mode_behind(error: type[BaseException]) -> None:
    def fail(y: Tensor) -> Tensor:
        raise error("no")

    network = Net(fail).train()
    with _attached(network) as attached:
        with pytest.raises(error, match="no"):
            network(torch.randn(4, 3, 8, 8))
        # Nothing runs in torch when an interrupt passes by.
        assert error is KeyboardInterrupt or _get_current_function_mode() is None
        network.tail = F.relu
        _step(network, attached, torch.randn(4, 3, 8, 8), 1)
    assert _get_current_function_mode() is None
