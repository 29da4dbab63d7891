"""L0 on weights and variational dropout: a step's memory, and the derivatives that are written out for its sake."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from secateur.core.duration import Progress
from secateur.regularizers import hard_concrete as gates
from secateur.regularizers import pieces as in_pieces
from secateur.regularizers.hard_concrete import expected_open, gated_weight, hard_concrete, keep_probability
from secateur.regularizers.l0 import L0
from secateur.regularizers.seeded import logistic_like
from secateur.regularizers.variational import (
    _DivergenceSlope,
    _NoiseOfWeights,
    divergence,
    divergence_of,
    log_alpha_of,
)
from secateur.regularizers.variational_dropout import VariationalDropout

SPECS = pytest.mark.parametrize(
    "spec", [L0(granularity="weight", factor=1e-3), VariationalDropout(factor=1e-3)], ids=["l0", "variational dropout"]
)
SEED = torch.tensor(2**61 + 5)


@pytest.fixture(autouse=True)
def as_large(monkeypatch):
    """What is small here stands for large layers."""
    monkeypatch.setattr(in_pieces, "_PIECE", 1 << 10)
    monkeypatch.setattr(gates, "SMALL", 0)


class Live(TorchDispatchMode):
    """The most bytes that tensors made within it took at one time; those that are there already count nothing."""

    def __init__(self, there):
        super().__init__()
        self._sizes, self.peak = {t.untyped_storage()._cdata: 0 for t in there}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self._sizes:
                self._sizes[key] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self._sizes.pop, key)
        self.peak = max(self.peak, sum(self._sizes.values()))
        return out


def _network(width, layers):
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.BatchNorm1d(width))))


def _peak(spec, width=128, layers=6):
    """Of the later of two steps, in copies of the weights; parameters are not in it, momentum is."""
    network, x = _network(width, layers), torch.randn(4, width)
    attachment = spec.attach(network) if spec else None
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    with Live(network.parameters()) as live:
        for step in (1, 2):
            optimizer.zero_grad()
            loss = network(x).square().mean()
            (loss + attachment.penalty() if attachment else loss).backward()
            optimizer.step()
            if attachment:
                attachment.after_step(Progress(step, 9, 1))
    return live.peak / (4 * layers * width**2)


@SPECS
def test_a_step_takes_little_beside_gradient_and_momentum(spec):
    # Both are learned for every weight: two copies. The rest is for one layer at a time, a sixth of a copy each.
    assert _peak(spec) - _peak(None) < 2.55


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_of_gates_is_that_of_the_uniform_numbers_of_the_seed(dtype, layout):
    like = torch.empty(5, 3, 4, 2, dtype=dtype).to(memory_format=layout)
    uniform = torch.rand(like.shape, generator=torch.Generator().manual_seed(int(SEED)))
    noise = logistic_like(like, SEED)
    assert torch.equal(noise, torch.logit(uniform, eps=1e-6).to(dtype))
    assert noise.stride() == like.stride()
    torch.library.opcheck(torch.ops.secateur.logistic_like.default, (like, SEED))


def _weights(shape, spread=2.5):
    torch.manual_seed(1)
    return [(scale * torch.randn(shape, dtype=torch.float64)).requires_grad_() for scale in (1.0, spread)]


def _plainly_gated(weight, log_alpha):
    return weight * hard_concrete(log_alpha, logistic_like(log_alpha, SEED))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gated_weights_and_their_gradients_equal_those_of_the_formula(layout):
    weight, log_alpha = (t.detach().to(memory_format=layout).requires_grad_() for t in _weights((40, 11, 3, 3)))
    ours, plain = gated_weight(weight, log_alpha, SEED), _plainly_gated(weight, log_alpha)
    torch.testing.assert_close(ours, plain)
    assert ours.stride() == plain.stride()
    back = torch.randn_like(ours)
    found = torch.autograd.grad(ours, [weight, log_alpha], back)
    expected = torch.autograd.grad(plain, [weight, log_alpha], back)
    torch.testing.assert_close(found, expected)
    assert bool((expected[1] == 0).any())


def test_gated_weights_have_second_derivatives():
    weight, log_alpha = _weights((4, 5))
    back, again = torch.randn(4, 5, dtype=torch.float64).requires_grad_(), torch.randn(2, 4, 5, dtype=torch.float64)
    results = []
    for gated in (gated_weight(weight, log_alpha, SEED), _plainly_gated(weight, log_alpha)):
        first = torch.autograd.grad(gated.sin(), [weight, log_alpha], back, create_graph=True)
        total = (torch.stack(first) * again).sum()
        results.append((*first, *torch.autograd.grad(total, [weight, log_alpha, back])))
    torch.testing.assert_close(*results)


def test_the_expected_number_of_open_gates_and_its_derivatives():
    (_, log_alpha) = _weights((30, 70))
    results = []
    for number in (expected_open(log_alpha), keep_probability(log_alpha).sum()):
        (flat,) = torch.autograd.grad(3 * number, [log_alpha], retain_graph=True)
        (first,) = torch.autograd.grad(3 * number.square(), [log_alpha], create_graph=True)
        results.append((number, flat, first, *torch.autograd.grad(first.square().sum(), [log_alpha])))
    torch.testing.assert_close(*results)


def _limits():
    weight = torch.linspace(-2, 2, 4002, dtype=torch.float64).reshape(6, -1).requires_grad_()
    log_sigma2 = torch.linspace(-12, 9, 4002, dtype=torch.float64).flip(0).reshape(6, -1).requires_grad_()
    return [weight, log_sigma2]


def test_the_divergence_and_its_gradients_equal_those_of_the_formula():
    inputs = _limits()
    ours = divergence_of(*inputs) + _DivergenceSlope.apply(*inputs)
    plain = divergence(log_alpha_of(*inputs).clamp(-8, 8)).sum()
    torch.testing.assert_close(ours, plain)
    expected = torch.autograd.grad(3 * plain, inputs)
    torch.testing.assert_close(torch.autograd.grad(3 * ours, inputs), expected)
    assert bool((expected[1] == 0).any())


def test_the_noise_of_weights_and_its_gradients_equal_those_of_the_formula():
    inputs = weight, log_sigma2 = _limits()
    with torch.no_grad():
        weight[0, :5] = torch.tensor([0.0, 1e-7, -1e-4, 1e-4, 1e-3])
        log_sigma2[0, :5] = torch.tensor([-19.0, -12.0, -18.0, -20.0, -14.0])
    ours = _NoiseOfWeights.apply(*inputs)
    plain = log_alpha_of(*inputs).clamp(-8, 8).exp() * weight.square()
    torch.testing.assert_close(ours, plain)
    back = torch.randn_like(ours)
    found, expected = torch.autograd.grad(ours, inputs, back), torch.autograd.grad(plain, inputs, back)
    torch.testing.assert_close(found, expected)


def _plain_penalty(attachment):
    """Of variational dropout, by the formula."""
    each = []
    for target in attachment.targets:
        log_alpha = log_alpha_of(attachment.parameters[target.name], attachment._log_sigma2(target))
        each.append(divergence(log_alpha.clamp(-8, 8)).sum())
    return attachment.spec.factor * sum(each)


def _nothing(network, x):
    pass


@torch.no_grad()
def _changed(network, x):
    network[2].weight.mul_(1.5)


def _thawed(network, x):
    network[0].weight.requires_grad_()


def _again(network, x):
    network(x)


def _recomputed(network, x):
    checkpoint(lambda x: network(x), x, use_reentrant=True)


@pytest.mark.parametrize("between", [_nothing, _changed, _thawed, _again, _recomputed])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_penalty_is_that_of_the_weights_when_it_is_asked_for(between, reentrant):
    network, x = _network(6, 2).double(), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    network[0].weight.requires_grad_(between is not _thawed)
    with VariationalDropout(factor=0.5).attach(network) as attachment:
        if reentrant is None:
            network(x)
        else:
            # Only the layers are run again, as a network does it inside.
            attachment.begin((), {})
            checkpoint(network[0], x, use_reentrant=reentrant)
            checkpoint(network[2], x, use_reentrant=reentrant)
        between(network, x)
        inputs = [*attachment.parameters.values(), *attachment.learned.values()]
        plain = _plain_penalty(attachment)
        expected = torch.autograd.grad(plain, inputs)
        for _ in range(2):
            penalty = attachment.penalty()
            torch.testing.assert_close(penalty, plain)
            torch.testing.assert_close(torch.autograd.grad(penalty, inputs), expected)
        with torch.no_grad():
            torch.testing.assert_close(attachment.penalty(), plain.detach())


@SPECS
def test_several_passes_back_from_one_pass_forward_and_gradients_that_add_up(spec):
    network, x = _network(6, 2), torch.randn(8, 6)
    with spec.attach(network, seed=1) as attachment:
        state = attachment.state_dict()

        def gradients(*halves):
            network.zero_grad()
            attachment.load_state_dict(state)
            out, penalty = network(x), attachment.penalty()
            for half in halves:
                (half * (out.square().mean() + penalty)).backward(retain_graph=True)
            return [p.grad.clone() for p in network.parameters()]

        torch.testing.assert_close(gradients(0.25, 0.75), gradients(1.0))


@SPECS
def test_compiled_gradients_equal_those_of_the_network_as_it_is(spec):
    network, x = _network(6, 2), torch.randn(8, 6)
    results = []
    torch._dynamo.reset()
    for called in (network, torch.compile(network, backend="aot_eager", fullgraph=True)):
        network.zero_grad()
        with spec.attach(called, seed=1) as attachment:
            (called(x).square().mean() + attachment.penalty()).backward()
            results.append([p.grad.clone() for p in network.parameters()])
    torch._dynamo.reset()
    torch.testing.assert_close(*results)
