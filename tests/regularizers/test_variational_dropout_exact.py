"""Variational dropout in networks: the noise's distribution, gradients, folding, compiled graphs, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur.core.duration import Progress
from secateur.core.seeds import keyed_generator
from secateur.errors import UsageError
from secateur.regularizers.seeded import normal_like
from secateur.regularizers.variational import _Noisy, _Square, divergence, log_alpha_of
from secateur.regularizers.variational_dropout import VariationalDropout
from secateur.testing import check_regularizer

LEAF = "variational_dropout_log_sigma2"

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "grouped, circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="circular"), (3, 4, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, bias=False), (3, 4, 7)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=1, output_padding=(1, 2), groups=2),
        (3, 4, 5, 4),
    ),
}


@torch.no_grad()
def _spread(attachment, mean=-4.0, deviation=3.0):
    for name, parameter in attachment.learned.items():
        parameter.copy_(torch.empty(parameter.shape).normal_(mean, deviation, generator=keyed_generator(0, name)))


def _noisy_weight(layer):
    log_alpha = log_alpha_of(layer.weight, getattr(layer, LEAF)).clamp(-8, 8)
    return log_alpha, (log_alpha.exp().sqrt() * layer.weight.abs()).detach()


@pytest.mark.parametrize("name", LAYERS)
def test_the_noise_on_outputs_is_what_noise_on_the_weights_causes(name):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = build().double(), torch.randn(shape).double()
    plain = copy.deepcopy(layer)
    with VariationalDropout().attach(layer, seed=3) as attachment, torch.no_grad():
        _spread(attachment, -3.0, 1.0)
        _, deviation = _noisy_weight(layer)
        with torch.enable_grad():
            drawn = torch.stack([layer(x).detach() for _ in range(3000)])
        generator, explicit = keyed_generator(7), []
        for _ in range(3000):
            noise = torch.empty(deviation.shape, dtype=deviation.dtype).normal_(generator=generator)
            plain.weight.copy_(layer.weight + deviation * noise)
            explicit.append(plain(x))
        weights = torch.stack(explicit)
    # Means of 3000 draws differ by at most five standard errors of the difference; deviations agree to ten percent
    # (their standard error is 1.3 percent, the difference's 1.8).
    error = (drawn.var(0) / 3000 + weights.var(0) / 3000).sqrt()
    assert float(((drawn.mean(0) - weights.mean(0)).abs() / (error + 1e-12)).max()) < 5
    torch.testing.assert_close(drawn.std(0), weights.std(0), rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_eval_mode_and_folding(name):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = build().double(), torch.randn(shape).double()
    attachment = VariationalDropout().attach(layer)
    _spread(attachment, 0.0)
    layer(x)
    attached = layer.eval()(x)
    kept = _noisy_weight(layer)[0] < 3
    masks = attachment.finalize()
    assert torch.equal(masks["weight"], kept)
    assert 0 < masks.sparsity < 1
    torch.testing.assert_close(layer(x), attached, rtol=1e-12, atol=1e-12)
    assert bool((layer.weight[~kept] == 0).all())
    assert [*layer.state_dict()] == [*build().state_dict()]


def test_gradients_of_loss_and_penalty_against_finite_differences():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)).double()
    x = torch.randn(5, 2, 4, 4).double()
    attachment = VariationalDropout(factor=0.3).attach(network, seed=1)
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
            assert parameter.grad.view(-1)[index].item() == pytest.approx(numeric, rel=1e-5, abs=1e-7), name


def test_the_gradient_of_the_divergence():
    log_alpha = torch.linspace(-7.9, 7.9, 41, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(divergence, log_alpha)
    assert bool((divergence(log_alpha).diff() < 0).all())


def test_scores_order_what_the_limits_would_tie():
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 1.0, 3.0]]))
    with VariationalDropout(log_sigma2_init=-12.0).attach(layer) as attachment:
        assert attachment.scores()["weight"].argsort().tolist() == [[1, 0, 2]]
        assert bool((attachment.scores()["weight"] > 8).all())


def test_without_gradients_in_train_mode_there_is_no_noise():
    network = nn.Sequential(nn.Linear(4, 4))
    with VariationalDropout().attach(network) as attachment:
        _spread(attachment, 0.0)
        x = torch.randn(3, 4)
        first, second = network(x), network(x)
        assert not torch.equal(first, second)
        with torch.no_grad():
            calibrating = network(x)
        assert torch.equal(calibrating, network.eval()(x))
        with torch.no_grad(), attachment.sampling(seed=1):
            assert not torch.equal(network(x), calibrating)


def test_normal_numbers_from_a_seed():
    generators = torch.get_rng_state()
    like, seed = torch.empty(100, 200), torch.tensor(2**61 + 5)
    noise = normal_like(like, seed)
    assert torch.equal(noise, normal_like(like, seed))
    assert not torch.equal(noise, normal_like(like, seed + 1))
    assert torch.equal(generators, torch.get_rng_state())
    # 20,000 numbers: within four standard errors of mean 0 and variance 1.
    assert abs(float(noise.mean())) < 4 / 20_000**0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / 20_000) ** 0.5
    # The layout of the activations does not matter.
    image = torch.empty(2, 3, 4, 5)
    strided = image.to(memory_format=torch.channels_last)
    assert torch.equal(normal_like(image, seed), normal_like(strided, seed))
    torch.library.opcheck(torch.ops.secateur.normal_like.default, (image, seed))


def test_other_settings_keep_the_contract():
    check_regularizer(VariationalDropout(factor=1e-2, warmup=0.5, threshold=-2.0))


def test_compiled_steps_and_evaluations_do_not_compile_again():
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 6)
    attachment = VariationalDropout().attach(compiled)
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
    attachment.remove()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": -1.0}, "factor is at least 0, got -1.0"),
        ({"factor": float("inf")}, "factor is at least 0, got inf"),
        ({"warmup": 1.5}, r"warmup is a share of the run in \[0, 1\], got 1.5"),
        ({"threshold": 9.0}, r"threshold lies in \(-8, 8\], got 9.0"),
        ({"log_sigma2_init": 5.0}, r"log_sigma2_init lies in \[-20, 2\], got 5.0"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        VariationalDropout(**settings)


def test_no_factor_no_penalty():
    with VariationalDropout(factor=0.0).attach(nn.Linear(3, 2)) as attachment:
        assert attachment.penalty() == 0.0


def test_noise_on_outputs_equals_the_plain_formula_and_stands_rounding_below_zero():
    torch.manual_seed(0)
    mean, variance = torch.randn(300, 500, dtype=torch.float64), torch.rand(300, 500, dtype=torch.float64)
    seed = torch.tensor(5)
    noise = normal_like(mean, seed)
    ours, plain = ([t.clone().requires_grad_() for t in (mean, variance)] for _ in range(2))
    # The variance is overwritten: what a layer puts out, not a leaf.
    noisy = _Noisy.apply(ours[0] * 1, ours[1] * 1, seed)
    torch.testing.assert_close(noisy, plain[0] + (plain[1] + 1e-8).sqrt() * noise)
    weights = torch.randn_like(mean)
    (noisy * weights).sum().backward()
    ((plain[0] + (plain[1] + 1e-8).sqrt() * noise) * weights).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    below = _Noisy.apply(mean.clone(), torch.full_like(mean, -1e-12), seed)
    torch.testing.assert_close(below, mean + 1e-4 * noise)


def test_squares_and_their_gradient():
    x = torch.randn(40, 7000, dtype=torch.float64, requires_grad=True)
    squares = _Square.apply(x)
    assert torch.equal(squares, x.detach() ** 2)
    weights = torch.randn_like(x)
    (squares * weights).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() * weights)
