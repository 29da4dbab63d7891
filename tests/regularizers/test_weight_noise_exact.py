"""Weight noise outside the graph equals weight noise inside it: the same masks, the same gradients."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.errors import NoEffectError, UsageError
from secateur.regularizers.base import WeightNoise
from secateur.regularizers.dropout import Dropout
from secateur.regularizers.targeted_dropout import TargetedDropout


@dataclass(frozen=True)
class Recorded(WeightNoise):
    """Any weight noise, with every multiplier it gives written down, one dict a draw."""

    inner: WeightNoise | None = None
    draws: ClassVar[list[dict[str, torch.Tensor]]] = []

    def multiplier(self, target, weight, stream, progress):
        found = (self.inner or TargetedDropout(gamma=0.7, alpha=0.6)).multiplier(target, weight, stream, progress)
        if not self.draws or target.name in self.draws[-1]:
            self.draws.append({})
        numbers, factor = found if isinstance(found, tuple) else (torch.ones(()) if found is None else found, 1.0)
        self.draws[-1][target.name] = numbers.to(weight.dtype).mul(factor).expand_as(weight).clone()
        return found


@pytest.fixture(autouse=True)
def _forget():
    Recorded.draws.clear()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.mixer = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 11)
        self.decoder.weight = self.embedding.weight

    def forward(self, x):
        return self.decoder(torch.tanh(self.mixer(self.embedding(x)))).flatten(0, 1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Functional(nn.Module):
    """One linear layer used three times, and one through F.linear."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.cell(x))
        return nn.functional.linear(x, self.head.weight, self.head.bias)


def _conv():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=4, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, groups=8),
        nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
        nn.GELU(),
        nn.Flatten(),
        nn.LazyLinear(4),
    )


def _network(kind):
    torch.manual_seed(3)
    if kind == "linear":
        return nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 4)), lambda n: torch.randn(n, 7)
    if kind == "conv":
        network = _conv()
        network(torch.randn(2, 3, 6, 6))
        return network, lambda n: torch.randn(n, 3, 6, 6)
    if kind == "tied":
        return Tied(), lambda n: torch.randint(11, (n, 5))
    if kind == "attention":
        return Attention(), lambda n: torch.randn(n, 5, 8)
    return Functional(), lambda n: torch.randn(n, 6)


KINDS = ["linear", "conv", "tied", "attention", "functional"]
SPECS = [
    TargetedDropout(gamma=0.7, alpha=0.6),
    TargetedDropout(gamma=0.7, alpha=0.6, granularity="unit"),
    Dropout(drop_rate=0.4),
    Dropout(drop_rate=0.4, granularity="unit"),
]


def _loss(model, x):
    out = model(x)
    return nn.functional.cross_entropy(out, torch.arange(len(out)) % out.shape[1])


def _in_graph(network, draw, x):
    """The loss with weight * multiplier inside autograd, on a copy."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    noisy = {n: p * draw[n] if n in draw else p for n, p in parameters.items()}
    for target in find_targets(network):
        for alias in target.aliases:
            noisy[alias] = noisy[target.name]
    if "embedding.weight" in noisy:
        noisy["embedding.weight"] = noisy["decoder.weight"]
    buffers = {n: b.clone() for n, b in network.named_buffers()}
    out = functional_call(network, ({**noisy, **buffers}), (x,), tie_weights=False)
    return nn.functional.cross_entropy(out, torch.arange(len(out)) % out.shape[1])


def _expected(network, draws_and_inputs):
    twin = copy.deepcopy(network)
    twin.zero_grad()
    twin.train()
    for draw, x in draws_and_inputs:
        _in_graph(twin, draw, x).backward()
    return {n: p.grad for n, p in twin.named_parameters()}


def _assert_gradients(network, expected):
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_the_in_graph_reference(kind, spec):
    network, data = _network(kind)
    x = data(6)
    with Recorded(spec).attach(network, seed=5):
        loss = _loss(network, x)
        loss.backward()
    assert len(Recorded.draws) == 1
    assert any(bool((m != 1).any()) for m in Recorded.draws[0].values())
    torch.testing.assert_close(loss, _in_graph(network.train(), Recorded.draws[0], x), rtol=1e-5, atol=1e-6)
    _assert_gradients(network, _expected(network, [(Recorded.draws[0], x)]))
    for name, multiplier in Recorded.draws[0].items():
        assert bool((network.get_parameter(name).grad[multiplier == 0] == 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_forward_passes_before_one_backward_pass_share_a_draw(kind):
    network, data = _network(kind)
    a, b = data(6), data(4)
    with Recorded().attach(network, seed=5):
        (_loss(network, a) + _loss(network, b)).backward()
    (draw,) = Recorded.draws
    _assert_gradients(network, _expected(network, [(draw, a), (draw, b)]))


def test_two_backward_passes_from_one_draw():
    network, data = _network("linear")
    a, b = data(6), data(4)
    with Recorded().attach(network, seed=5):
        one, other = _loss(network, a), _loss(network, b)
        one.backward()
        other.backward()
    (draw,) = Recorded.draws
    _assert_gradients(network, _expected(network, [(draw, a), (draw, b)]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_accumulation_draws_afresh(kind):
    network, data = _network(kind)
    batches = [data(6), data(6), data(3)]
    with Recorded().attach(network, seed=5):
        for x in batches:
            _loss(network, x).backward()
    assert len(Recorded.draws) == 3
    name = next(iter(Recorded.draws[0]))
    assert not torch.equal(Recorded.draws[0][name], Recorded.draws[1][name])
    _assert_gradients(network, _expected(network, zip(Recorded.draws, batches, strict=True)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.checkpointed = True
            self.stem, self.body, self.head = (
                nn.Linear(7, 9),
                nn.Sequential(nn.Linear(9, 9), nn.ReLU()),
                nn.Linear(9, 4),
            )

        def forward(self, x):
            x = self.stem(x)
            # functional_call cannot be recomputed: it puts the parameters back before the backward pass.
            return self.head(checkpoint(self.body, x, use_reentrant=reentrant) if self.checkpointed else self.body(x))

    torch.manual_seed(0)
    network, x = Checkpointed(), torch.randn(6, 7)
    with Recorded().attach(network, seed=5):
        _loss(network, x).backward()
    (draw,) = Recorded.draws
    network.checkpointed = False
    _assert_gradients(network, _expected(network, [(draw, x)]))


def test_a_checkpoint_of_the_whole_model():
    network, data = _network("linear")
    x = data(6)
    with Recorded().attach(network, seed=5):
        _loss(lambda x: checkpoint(network, x, use_reentrant=False), x).backward()
    (draw,) = Recorded.draws
    _assert_gradients(network, _expected(network, [(draw, x)]))


def _evaluate(network, x):
    with torch.no_grad():
        network.eval()(x)
    network.train()


def _evaluate_in_inference_mode(network, x):
    with torch.inference_mode():
        network.eval()(x)
    network.train()


def _no_grad_in_train_mode(network, x):
    with torch.no_grad():
        network(x)


def _save(network, x):
    network.state_dict()


def _step_of_another(network, x):
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=1.0).step()


def _failed_evaluation(network, x):
    network.eval()
    with torch.no_grad(), pytest.raises(RuntimeError):
        network(x.repeat(1, 2))
    network.train()


@pytest.mark.parametrize(
    "between",
    [_evaluate, _evaluate_in_inference_mode, _no_grad_in_train_mode, _save, _step_of_another, _failed_evaluation],
)
def test_what_happens_between_forward_and_backward_does_not_touch_the_gradient(between):
    network, data = _network("linear")
    x = data(6)
    with Recorded().attach(network, seed=5):
        loss = _loss(network, x)
        between(network, x)
        loss.backward()
    assert len(Recorded.draws) == 1
    _assert_gradients(network, _expected(network, [(Recorded.draws[0], x)]))


def test_evaluation_and_saving_in_a_step_see_plain_weights():
    network, data = _network("conv")
    x, plain = data(6), {}
    for name, tensor in network.state_dict().items():
        plain[name] = tensor.clone()
    twin = copy.deepcopy(network).eval()
    with Recorded().attach(network, seed=5):
        loss = _loss(network, x)
        for name, tensor in network.state_dict().items():
            if name in dict(network.named_parameters()):
                assert torch.equal(tensor, plain[name]), name
        twin.load_state_dict(network.state_dict())
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(network.eval()(x), twin(x))
        with torch.inference_mode():
            assert torch.equal(network(x), twin(x))
        assert torch.equal(network(x), twin(x))
        network.train()
        loss.backward()
        saved = network.state_dict()
    assert all(torch.equal(saved[n], plain[n]) for n, _ in network.named_parameters())


def test_a_saved_state_stays_plain_when_training_goes_on():
    network, data = _network("linear")
    plain = {n: p.detach().clone() for n, p in network.named_parameters()}
    with Recorded().attach(network, seed=5):
        loss = _loss(network, data(6))
        saved = network.state_dict()
        loss.backward()
        assert all(torch.equal(saved[n], plain[n]) for n in plain)


def test_loading_in_the_middle_of_a_step_is_not_lost():
    network, data = _network("linear")
    checkpoint_ = {n: torch.full_like(p, 0.25) for n, p in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    with Recorded().attach(network, seed=5) as attachment:
        _loss(network, data(6))
        network.load_state_dict(checkpoint_)
        _loss(network, data(6)).backward()
        optimizer.step()
        attachment.after_step(Progress(1, 2, 1))
    assert all(torch.equal(p, checkpoint_[n]) for n, p in network.named_parameters())


def test_an_exception_in_the_middle_leaves_a_working_attachment():
    network, data = _network("linear")
    plain = {n: p.detach().clone() for n, p in network.named_parameters()}
    x = data(6)
    with Recorded().attach(network, seed=5):
        with pytest.raises(RuntimeError):
            network(torch.randn(6, 3))
        _loss(network, x).backward()
        _assert_gradients(network, _expected_plain(network, plain, Recorded.draws[-1], x))
    assert all(torch.equal(p, plain[n]) for n, p in network.named_parameters())


def _expected_plain(network, plain, draw, x):
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(plain[name])
    return _expected(twin, [(draw, x)])


def test_an_exception_inside_the_with_block_restores_the_weights():
    network, data = _network("linear")
    plain = {n: p.detach().clone() for n, p in network.named_parameters()}

    def interrupted():
        with Recorded().attach(network, seed=5):
            _loss(network, data(6))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(p, plain[n]) for n, p in network.named_parameters())


def test_a_skipped_step_as_a_gradient_scaler_does_it():
    network, data = _network("linear")
    plain = {n: p.detach().clone() for n, p in network.named_parameters()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    with Recorded().attach(network, seed=5) as attachment:
        _loss(network, data(6)).backward()
        optimizer.zero_grad()
        attachment.after_step(Progress(1, 3, 1))
        assert all(torch.equal(p, plain[n]) for n, p in network.named_parameters())
        x = data(6)
        _loss(network, x).backward()
        expected = _expected_plain(network, plain, Recorded.draws[-1], x)
        optimizer.step()
        attachment.after_step(Progress(2, 3, 1))
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter, plain[name] - 0.5 * expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam, torch.optim.LBFGS])
def test_closures_update_the_plain_weights(optimizer_class):
    network, data = _network("linear")
    x = data(6)
    before = {n: p.detach().clone() for n, p in network.named_parameters()}
    optimizer = optimizer_class(network.parameters(), lr=0.1)
    with Recorded().attach(network, seed=5) as attachment:

        def closure():
            optimizer.zero_grad()
            loss = _loss(network, x)
            loss.backward()
            return loss

        optimizer.step(closure=closure)
        after = {n: p.detach().clone() for n, p in network.named_parameters()}
        attachment.after_step(Progress(1, 2, 1))
    assert all(torch.equal(p, after[n]) for n, p in network.named_parameters())
    kept_everywhere = {n: torch.stack([d[n] for d in Recorded.draws]).bool().all(0) for n in Recorded.draws[0]}
    for name, kept in kept_everywhere.items():
        assert not torch.equal(after[name][kept], before[name][kept])
        assert bool((after[name] != 0).all()), "a dropped weight was lost"


def test_parameters_unfrozen_after_attaching_get_exact_gradients():
    network, data = _network("linear")
    network[0].weight.requires_grad_(False)
    x = data(6)
    with Recorded().attach(network, seed=5) as attachment:
        _loss(network, x).backward()
        assert network[0].weight.grad is None
        network[0].weight.requires_grad_(True)
        network.zero_grad()
        attachment.after_step(Progress(1, 2, 1))
        _loss(network, x).backward()
    _assert_gradients(network, _expected(network, [(Recorded.draws[-1], x)]))
    assert network[0].weight._backward_hooks is None


def test_autograd_grad_and_double_backward():
    network, data = _network("linear")
    network = network.double()
    x = data(6).double()
    weight = network[0].weight
    with Recorded().attach(network, seed=5):
        loss = _loss(network, x)
        (gradient,) = torch.autograd.grad(loss, [weight], create_graph=True)
        gradient.square().sum().backward()
        second = weight.grad.clone()
    draw = {n: m.double() for n, m in Recorded.draws[0].items()}
    twin = copy.deepcopy(network)
    twin.zero_grad()
    inside = _in_graph(twin, draw, x)
    (reference,) = torch.autograd.grad(inside, [twin[0].weight], create_graph=True)
    torch.testing.assert_close(gradient, reference)
    reference.square().sum().backward()
    torch.testing.assert_close(second, twin[0].weight.grad)


def test_autocast_uses_the_fresh_draw_every_step():
    network, data = _network("linear")
    x = data(6)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        Recorded(TargetedDropout(gamma=1.0, alpha=0.5)).attach(network) as a,
    ):
        for step in range(3):
            network.zero_grad()
            out = network(x)
            noisy = {n: p * Recorded.draws[-1][n] if n in Recorded.draws[-1] else p for n, p in _plain(a).items()}
            expected = functional_call(copy.deepcopy(network), noisy, (x,))
            torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
            out.sum().backward()
            a.after_step(Progress(step + 1, 3, 1))


def _plain(attachment):
    return {n: t.detach().clone() for n, t in attachment.network.state_dict().items()}


def test_bf16_networks_train_under_weight_noise():
    network, data = _network("conv")
    network = network.bfloat16()
    with TargetedDropout(gamma=0.5, alpha=0.5).attach(network) as attachment:
        _loss(network, data(4).bfloat16()).backward()
        attachment.after_step(Progress(1, 2, 1))
    assert all(p.dtype == torch.bfloat16 for p in network.parameters())


def test_channels_last_weights_keep_their_layout():
    network, data = _network("conv")
    network = network.to(memory_format=torch.channels_last)
    strides = [p.stride() for p in network.parameters()]
    x = data(6)
    with Recorded().attach(network, seed=5):
        _loss(network, x).backward()
    assert [p.stride() for p in network.parameters()] == strides
    _assert_gradients(network, _expected(network, [(Recorded.draws[0], x)]))


def test_an_update_that_would_be_lost_is_an_error():
    network, data = _network("linear")
    before = network[0].weight.detach().clone()
    with TargetedDropout().attach(network) as attachment:
        _loss(network, data(6)).backward()
        # What an optimizer does that is no torch.optim.Optimizer.
        with torch.no_grad():
            network[0].weight.add_(1.0)
        with pytest.raises(UsageError, match=r'"0\.weight" was written to .* call end\(\) before'):
            attachment.after_step(Progress(1, 3, 1))
        assert torch.equal(network[0].weight, before)
        _loss(network, data(6)).backward()
        attachment.end()
        with torch.no_grad():
            network[0].weight.add_(1.0)
        attachment.after_step(Progress(2, 3, 1))
        assert torch.equal(network[0].weight, before + 1.0)
        _loss(network, data(6))
        with torch.no_grad():
            network[0].weight.add_(1.0)
    assert torch.equal(network[0].weight, before + 1.0)


def test_a_write_during_an_evaluation_in_a_step_is_kept():
    network, data = _network("linear")

    class Nudge(nn.Module):
        def forward(self, x):
            if not self.training:
                network[0].weight.add_(1.0)
            return x

    network.append(Nudge())
    before = network[0].weight.detach().clone()
    with TargetedDropout().attach(network) as attachment:
        _loss(network, data(6))
        _evaluate(network, data(6))
        attachment.after_step(Progress(1, 2, 1))
    assert torch.equal(network[0].weight, before + 1.0)


def test_a_forward_pass_of_the_wrong_object_is_noticed():
    network, data = _network("linear")
    wrapper = nn.Sequential(network)
    with TargetedDropout().attach(wrapper) as attachment:
        _loss(network, data(6)).backward()
        with pytest.raises(NoEffectError, match="attach to the very object"):
            attachment.after_step(Progress(1, 2, 1))


def test_targets_choose_what_is_noisy():
    network, data = _network("linear")
    with Recorded().attach(network, find_targets(network, exclude=["@last"]), seed=5):
        _loss(network, data(6)).backward()
    assert list(Recorded.draws[0]) == ["0.weight"]


def test_two_regularizers_cannot_swap_the_same_weights():
    model = nn.Linear(4, 4)
    with TargetedDropout().attach(model):
        with pytest.raises(UsageError, match="already under the weight noise"):
            Dropout().attach(model)
        assert len(model._forward_pre_hooks) == 1
    Dropout().attach(model).remove()
    assert not model._forward_pre_hooks


def test_a_cut_while_attached_or_held_is_refused_at_the_next_use():
    from secateur.lab.oneshot import prune_units_, prune_weights

    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hold = prune_weights(model, 0.5).hold(model, optimizer)
    with TargetedDropout().attach(model):
        prune_units_(model, 0.5, x, optimizer=optimizer, multiple_of=1)
        with pytest.raises(UsageError, match="replaced while attached"):
            model(x)
    model(x).sum().backward()
    with pytest.raises(UsageError, match="no longer the parameter that is held"):
        optimizer.step()
    hold.remove()
