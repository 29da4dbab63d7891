"""L0 in networks: every layer type, gradients, expectations, folding, resuming, compiled graphs, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.errors import CheckpointError, UsageError
from secateur.regularizers.hard_concrete import hard_concrete, keep_probability
from secateur.regularizers.l0 import L0
from secateur.regularizers.seeded import logistic_like
from secateur.regularizers.targeted_dropout import TargetedDropout
from secateur.regularizers.variational_dropout import VariationalDropout
from secateur.testing import check_regularizer

BOTH = pytest.mark.parametrize("granularity", ["unit", "weight"])

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear on sequences": (lambda: nn.Linear(6, 4), (3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (3, 4, 7)),
    "strided, dilated": (lambda: nn.Conv2d(4, 6, 3, stride=2, dilation=2, bias=False), (3, 4, 9, 8)),
    "grouped, circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="circular"), (3, 4, 5, 5)),
    "same padding": (lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="reflect"), (3, 4, 5, 5)),
    "no batch axis": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (3, 2, 4, 4, 4)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=1, output_padding=(1, 2), groups=2),
        (3, 4, 5, 4),
    ),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, dilation=2, bias=False), (3, 4, 5)),
}


def _gates(attachment):
    return next(iter(attachment.learned.values()))


@torch.no_grad()
def _spread(attachment, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in attachment.learned.values():
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 2.5, generator=generator))


@BOTH
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_gated_as_if_its_weights_were(name, granularity):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = build().double(), torch.randn(shape).double()
    plain, (target,) = copy.deepcopy(layer), find_targets(layer)
    attachment = L0(granularity=granularity).attach(layer, seed=1)
    _spread(attachment)
    got = layer(x)
    z = hard_concrete(_gates(attachment), logistic_like(_gates(attachment), attachment._seeds["weight"])).detach()
    with torch.no_grad():
        plain.weight.mul_(target.spread(z) if granularity == "unit" else z)
        if plain.bias is not None and granularity == "unit":
            plain.bias.mul_(z)
    torch.testing.assert_close(got, plain(x), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        attached, masks = layer.eval()(x), attachment.finalize()
    assert 0 < masks.sparsity < 1
    torch.testing.assert_close(layer(x), attached, rtol=1e-10, atol=1e-12)
    assert bool((layer.weight[~masks["weight"]] == 0).all())
    rows = target.rows(masks["weight"])
    if granularity == "unit":
        assert bool((rows.all(1) | ~rows.any(1)).all())
        if layer.bias is not None:
            assert bool((layer.bias[~rows.any(1)] == 0).all())


@BOTH
def test_gradients_of_loss_and_penalty_against_finite_differences(granularity):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    x = torch.randn(5, 2, 4, 4).double()
    attachment = L0(granularity=granularity, factor=0.3).attach(network, seed=1)
    _spread(attachment)
    state = attachment.state_dict()

    def total():
        attachment.load_state_dict(state)
        return network(x).square().mean() + attachment.penalty()

    total().backward()
    for name, parameter in network.named_parameters():
        flat = parameter.data.view(-1)
        for index in range(0, flat.numel(), max(1, flat.numel() // 7)):
            here, values = flat[index].item(), []
            for step in (1e-6, -1e-6):
                flat[index] = here + step
                values.append(total().item())
            flat[index] = here
            numeric = (values[0] - values[1]) / 2e-6
            assert parameter.grad.view(-1)[index].item() == pytest.approx(numeric, rel=1e-5, abs=1e-8), name


def test_drawn_gates_have_the_mean_and_the_zeros_that_are_claimed():
    layer = nn.Linear(1, 4000, bias=False)
    nn.init.ones_(layer.weight)
    attachment = L0().attach(layer, seed=5)
    with torch.no_grad():
        _gates(attachment).zero_()
    seen = torch.stack([layer(torch.ones(1, 1)).detach()[0] for _ in range(10)])
    # E[z] = 0.5 and P(z > 0) = 0.831822 at log_alpha = 0, of 40,000 gates: within four standard errors.
    assert abs(seen.mean() - 0.5) < 4 * seen.std() / seen.numel() ** 0.5
    assert abs((seen > 0).double().mean() - 0.831822) < 4 * (0.831822 * 0.168178 / seen.numel()) ** 0.5
    assert abs((seen == 1).double().mean() - 0.168178) < 4 * (0.831822 * 0.168178 / seen.numel()) ** 0.5
    assert not torch.equal(seen[0], seen[1])


def test_log_alpha_stays_within_its_bounds_and_learns_from_the_penalty():
    network = nn.Sequential(nn.Linear(3, 4))
    attachment = L0(factor=1.0).attach(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=100.0)
    for step in range(1, 4):
        optimizer.zero_grad()
        (network(torch.zeros(2, 3)).sum() * 0 + attachment.penalty()).backward()
        optimizer.step()
        attachment.after_step(Progress(step, 3, 1))
        assert float(_gates(attachment).detach().abs().max()) <= 4.60518
    assert bool((_gates(attachment) < -4.6).all())
    masks = attachment.finalize()
    assert masks.kept == 0
    assert bool((network(torch.randn(2, 3)) == 0).all())


def test_a_tied_weight_has_one_gate_wherever_it_is_used():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    network[2].weight = network[0].weight
    x = torch.randn(3, 4)
    attachment = L0().attach(network)
    assert list(attachment.learned) == ["0.l0_log_alpha"]
    _spread(attachment)
    attached = network.eval()(x)
    attachment.finalize()
    torch.testing.assert_close(network(x), attached)


def test_without_gradients_in_train_mode_the_gates_are_those_of_evaluation():
    network = nn.Sequential(nn.Linear(4, 4))
    with L0().attach(network) as attachment:
        _spread(attachment)
        x = torch.randn(3, 4)
        network(x)
        with torch.no_grad():
            calibrating = network(x)
        assert torch.equal(calibrating, network.eval()(x))


def test_sampling_draws_in_eval_mode():
    network = nn.Sequential(nn.Linear(4, 4)).eval()
    with L0().attach(network) as attachment, torch.no_grad():
        _gates(attachment).zero_()
        x = torch.randn(3, 4)
        plain = network(x)
        with attachment.sampling(seed=1):
            first, second = network(x), network(x)
        assert not torch.equal(first, second)
        assert not torch.equal(first, plain)
        assert torch.equal(network(x), plain)


def test_a_scale_before_a_batchnorm_is_undone_by_it_except_for_zero():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3, eps=1e-12)).double()
    x = torch.randn(50, 4).double()
    plain = network(x).detach()
    attachment = L0().attach(network)
    with torch.no_grad():
        _gates(attachment).copy_(torch.tensor([0.0, 0.5, -4.0]))
        gated = network(x)
    torch.testing.assert_close(gated[:, :2], plain[:, :2], rtol=1e-6, atol=1e-8)
    assert float(gated[:, 2].abs().max()) == 0.0
    assert attachment.finalize()["0.weight"].any(1).tolist() == [True, True, False]


@BOTH
def test_other_settings_keep_the_contract(granularity):
    check_regularizer(L0(granularity=granularity, factor=1e-3, drop_rate_init=0.5))


@BOTH
def test_compiled_steps_and_evaluations_do_not_compile_again(granularity):
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 6)
    attachment = L0(granularity=granularity).attach(compiled)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def step(number):
        (compiled.train()(x).sum() + attachment.penalty()).backward()
        optimizer.step()
        attachment.after_step(Progress(number, 9, 1))
        compiled.eval()
        with torch.no_grad():
            return compiled(x)

    step(1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in (2, 3, 4):
            attached = step(number)
    torch.testing.assert_close(attached, network(x))
    attachment.finalize()
    torch._dynamo.reset()
    torch.testing.assert_close(attached, network(x))


def test_a_compiler_drops_the_output_that_weight_gates_replace():
    from torch._dynamo.backends.common import aot_autograd

    found = []

    def look(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    torch._dynamo.reset()
    compiled = torch.compile(network, backend=aot_autograd(fw_compiler=look), fullgraph=True)
    with L0(granularity="weight").attach(compiled), torch.no_grad():
        compiled.eval()(torch.randn(2, 3, 4, 4))
    torch._dynamo.reset()
    assert sum("convolution" in op for op in found) == sum("addmm" in op for op in found) == 1


def test_scores_are_keep_probabilities():
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    for granularity, shapes in (("unit", [(3,), (2,)]), ("weight", [(3, 4), (2, 3)])):
        with L0(granularity=granularity).attach(network) as attachment:
            scores = attachment.scores()
            assert [tuple(s.shape) for s in scores.values()] == shapes
            assert list(scores) == ["0.weight", "2.weight"]
            for score, gate in zip(scores.values(), attachment.learned.values(), strict=True):
                torch.testing.assert_close(score, keep_probability(gate.detach()))
                assert not score.requires_grad


class _Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@pytest.mark.parametrize("spec", [L0(), L0(granularity="weight"), VariationalDropout()], ids=str)
def test_layers_that_cannot_be_gated_are_refused_and_nothing_stays(spec):
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    keys, parameters = list(attention.state_dict()), len(list(attention.parameters()))
    with pytest.raises(UsageError, match=r'layer "self_attn" belongs to an attention layer.*exclude'):
        spec.attach(attention)
    with pytest.raises(UsageError, match=r'"self_attn.out_proj" belongs to an attention layer'):
        spec.attach(attention, find_targets(attention, include=["self_attn.out_proj"]))
    assert list(attention.state_dict()) == keys
    assert len(list(attention.parameters())) == parameters
    assert not attention._forward_pre_hooks
    spec.attach(attention, find_targets(attention, exclude=["self_attn*"])).remove()
    with pytest.raises(UsageError, match=r"is a _Own with a forward of its own"):
        spec.attach(nn.Sequential(_Own(3, 2)))
    tied = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    tied[1].weight = tied[0].weight
    with pytest.raises(UsageError, match="shares its weight with a module of another kind"):
        spec.attach(tied)
    network = nn.Sequential(nn.Linear(3, 2))
    with spec.attach(network), pytest.raises(UsageError, match=r"another attached method"):
        L0().attach(network)


@BOTH
def test_other_hooks_on_a_layer_still_act(granularity):
    layer = nn.Linear(3, 2)
    layer.register_forward_hook(lambda module, args, output: output + 100.0)
    with L0(granularity=granularity).attach(layer) as attachment:
        with torch.no_grad():
            _gates(attachment).fill_(4.0)
        x = torch.randn(2, 3)
        expected = nn.functional.linear(x, layer.weight, layer.bias) + 100.0
        torch.testing.assert_close(layer.eval()(x), expected)


def test_it_goes_with_weight_noise():
    network = nn.Sequential(nn.Linear(3, 2))
    with L0().attach(network) as gates, TargetedDropout(gamma=0.5, alpha=1.0).attach(network) as noise:
        before = network[0].weight.detach().clone()
        (network(torch.randn(2, 3)).sum() + gates.penalty()).backward()
        noise.after_step(Progress(1, 2, 1))
        gates.after_step(Progress(1, 2, 1))
        assert torch.equal(network[0].weight, before), "plain weights come back"
        smallest = before.abs().argmin(1, keepdim=True)
        assert bool((network[0].weight.grad.gather(1, smallest) == 0).all()), "the dropped weight got a gradient"
        assert all(bool((p.grad != 0).any()) for p in gates.learned.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": -1.0}, "factor is at least 0, got -1.0"),
        ({"factor": float("nan")}, "factor is at least 0, got nan"),
        ({"granularity": "filter"}, 'unknown l0 granularity "filter"'),
        ({"drop_rate_init": 0.0}, r"drop_rate_init lies in \(0, 1\), got 0.0"),
        ({"drop_rate_init": 1.0}, r"drop_rate_init lies in \(0, 1\), got 1.0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        L0(**settings)


def test_a_state_of_another_method_is_refused():
    with L0().attach(nn.Linear(3, 2)) as attachment, pytest.raises(CheckpointError, match="expected"):
        attachment.load_state_dict({"progress": torch.zeros(3)})
    with L0(factor=0.0).attach(nn.Linear(3, 2)) as attachment:
        assert attachment.penalty() == 0.0
