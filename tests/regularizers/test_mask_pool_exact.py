"""The mask pool at work: where the masks act, which are taken, what is refused; rate, state and traces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.errors import CheckpointError, NoEffectError, UsageError
from secateur.regularizers.mask_pool import MaskPoolDropout, unit_mask
from secateur.testing import check_regularizer


def _x(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """Convolutions with and without BatchNorm, an in-place function, a residual sum, a linear head."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 8, 3, padding=1)
        self.conv2, self.bn2 = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.fc, self.bn3 = nn.Linear(6, 10), nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 3)
        self.factors = {}

    def at(self, name, y):
        factor = self.factors.get(name)
        return y if factor is None else y * factor.reshape(1, -1, *[1] * (y.dim() - 2))

    def forward(self, x):
        x = F.relu(self.at("stem", self.bn0(self.stem(x))), inplace=True)
        y = self.at("conv2", self.bn2(self.conv2(F.relu(self.at("conv1", self.conv1(x))))))
        y += x
        y = F.relu(y).mean((2, 3))
        return self.head(F.relu(self.at("fc", self.bn3(F.relu(self.fc(y))))))


def _network():
    torch.manual_seed(0)
    network = Residual().train()
    for name, parameter in network.named_parameters():
        if name.startswith("bn"):
            nn.init.normal_(parameter)
    return network


def _targets(network):
    return find_targets(network, exclude=["@last"])


def test_it_equals_the_masks_written_into_the_network_by_hand():
    network, x = _network().double(), _x(4, 2, 5, 5).double()
    twin = copy.deepcopy(network)
    with MaskPoolDropout(drop_rate=0.4, pool=3).attach(network, _targets(network), seed=5) as attachment:
        taken = set()
        for _ in range(6):
            network.zero_grad()
            twin.zero_grad()
            out = network(x)
            taken.add(attachment.mask_seed)
            for target in _targets(network):
                kept = unit_mask(attachment.mask_seed, target.name, target.units, 0.4)
                twin.factors[target.module] = kept.double() / 0.6
            expected = twin(x)
            torch.testing.assert_close(out, expected)
            out.square().sum().backward()
            expected.square().sum().backward()
            for p, q in zip(network.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
            for b, c in zip(network.buffers(), twin.buffers(), strict=True):
                torch.testing.assert_close(b, c)
        assert taken == {0, 1, 2}
        # Behind the BatchNorm where one follows, through a function in between too.
        assert {n: s.module for n, s in attachment.sites.items()} == {
            "stem.weight": "bn0",
            "conv1.weight": "conv1",
            "conv2.weight": "bn2",
            "fc.weight": "bn3",
        }


def test_the_first_pass_looks_without_a_trace():
    network = Residual().train()
    network.extra = nn.Dropout(0.5).eval()
    twin, x = copy.deepcopy(network), _x(4, 2, 5, 5)
    with MaskPoolDropout(drop_rate=0.0).attach(network):
        before = torch.get_rng_state()
        assert torch.equal(network(x), twin(x))
        assert torch.equal(torch.get_rng_state(), before)
        # Statistics have been updated once, by the training pass alone.
        assert all(torch.equal(b, c) for b, c in zip(network.buffers(), twin.buffers(), strict=True))
        assert network.training
        assert not network.extra.training


@pytest.mark.parametrize(
    ("make", "x", "sites"),
    [
        (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.GELU(), nn.BatchNorm1d(4)), (3, 2, 8), ["2"]),
        (lambda: nn.Sequential(nn.ConvTranspose2d(2, 4, 2, groups=2), nn.BatchNorm2d(4)), (3, 2, 4, 4), ["1"]),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4)), (3, 2, 6, 6), ["2"]),
        (lambda: nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)), (4, 3), ["0", "2"]),
        (lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), (4, 7, 3), ["0", "2"]),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 2)), (3, 2, 4, 4), ["0", "2"]),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()), (2, 6, 6), ["0"]),
        (lambda: nn.Linear(3, 5), (4, 3), [""]),
    ],
)
def test_sites_and_axes(make, x, sites):
    torch.manual_seed(0)
    network = make().train()
    with MaskPoolDropout(drop_rate=0.5).attach(network, seed=2) as attachment:
        out = network(_x(*x))
        assert [s.module for s in attachment.sites.values()] == sites
        name, site = list(attachment.sites.items())[-1]
        kept = unit_mask(attachment.mask_seed, name, attachment.targets[name].units, 0.5)
        if site.module in ("", str(len(list(network.children())) - 1)):
            moved = out.detach().movedim(site.axis, 0)
            assert bool((moved[~kept] == 0).all())
            assert bool(moved[kept].abs().sum() > 0)


class _TwoWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y = self.conv(x)
        return self.last(self.bn(y) + y)


class _SharedNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.a(x)) + self.bn(self.b(x))


class _Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 3)

    def forward(self, x):
        return F.linear(x, self.fc.weight, self.fc.bias)


class _FunctionalNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 3)

    def forward(self, x):
        return F.batch_norm(self.fc(x), None, None, training=True)


class _Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.bn = nn.Conv2d(2, 4, 1), nn.Conv2d(2, 4, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.bn(torch.cat([self.a(x), self.b(x)], dim=1))


@pytest.mark.parametrize(
    ("make", "x", "why"),
    [
        (_TwoWays, (3, 2, 4, 4), '"conv" is unsure: a BatchNorm follows it on one way'),
        (_SharedNorm, (3, 2, 4, 4), 'BatchNorm "bn" normalizes the output of other layers too'),
        (_Functional, (3, 2), '"fc" is unsure: it was not called'),
        (_FunctionalNorm, (3, 2), "runs into a function batch_norm"),
        (_Concatenated, (3, 2, 4, 4), '"a" is unsure: it runs into BatchNorm "bn" in another order'),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)),
            (3, 2, 4, 4),
            "runs into a function group_norm",
        ),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.BatchNorm1d(16)), (3, 2, 4, 4), "another order"),
    ],
)
def test_what_is_unsure_is_refused(make, x, why):
    network = make().train()
    with MaskPoolDropout().attach(network), pytest.raises(UsageError, match=why):
        network(_x(*x))


def test_attention_is_refused_or_left_out_and_the_fused_path_does_not_hide_layers():
    torch.manual_seed(0)
    network = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(UsageError, match="kind attention"):
        MaskPoolDropout().attach(network)
    with (
        MaskPoolDropout().attach(network, find_targets(network, exclude=["self_attn.in_proj_weight"])),
        pytest.raises(UsageError, match=r'"self_attn.out_proj" is unsure: it was not called'),
    ):
        network(_x(2, 3, 8))
    with MaskPoolDropout().attach(network, find_targets(network, include=["linear*"])) as attachment:
        network(_x(2, 3, 8))
        assert [s.module for s in attachment.sites.values()] == ["linear1", "linear2"]
        assert torch.backends.mha.get_fastpath_enabled()


def test_the_rate_can_be_changed_and_masks_are_nested():
    network, x = nn.Sequential(nn.Linear(4, 200)).train(), _x(3, 4)
    with MaskPoolDropout(drop_rate=0.3, pool=1).attach(network) as attachment:
        dropped = []
        for rate in (0.3, 0.6, 0.0):
            attachment.drop_rate = rate
            dropped.append((network(x) == 0).all(0))
        assert bool((dropped[1] | ~dropped[0]).all())
        assert 0 < int(dropped[0].sum()) < int(dropped[1].sum())
        assert int(dropped[2].sum()) == 0
        assert attachment.drop_rate == 0.0
        with pytest.raises(UsageError, match=r"drop_rate lies in \[0, 1\), got 1.0"):
            attachment.drop_rate = 1.0


def test_expectation_over_fresh_masks_is_the_plain_network():
    network, x = nn.Sequential(nn.Linear(4, 50)).train(), _x(1, 4)
    plain = network(x).detach()
    draws = 800
    with MaskPoolDropout(drop_rate=0.5, pool=None).attach(network, seed=1) as attachment:
        seeds, total = set(), torch.zeros(50)
        for _ in range(draws):
            total += network(x).detach()[0]
            seeds.add(attachment.mask_seed)
        assert len(seeds) == draws
        # A factor of 0 or 2 with equal odds has standard deviation 1.
        assert bool(((total / draws - plain[0]).abs() <= 5 * plain[0].abs() / draws**0.5).all())


def test_the_rate_and_the_draws_are_resumed():
    network, x = nn.Sequential(nn.Linear(4, 20)).train(), _x(3, 4)

    def passes(attachment, count):
        seeds = []
        for step in range(count):
            network(x)
            seeds.append((attachment.mask_seed, network(x).ne(0).all(0).tolist()))
            attachment.after_step(Progress(step + 1, 9, 3))
        return seeds

    with MaskPoolDropout().attach(network, seed=1) as attachment:
        attachment.drop_rate = 0.25
        passes(attachment, 2)
        state = attachment.state_dict()
        expected = passes(attachment, 4)
    with MaskPoolDropout().attach(network, seed=9) as attachment:
        attachment.load_state_dict(state)
        assert attachment.drop_rate == 0.25
        assert passes(attachment, 4) == expected
        with pytest.raises(CheckpointError, match="drop_rate"):
            attachment.load_state_dict({k: v for k, v in state.items() if k != "drop_rate"})


def test_masks_do_not_depend_on_the_seed_of_the_attachment():
    network, x = nn.Sequential(nn.Linear(4, 50)).train(), _x(1, 4)
    for seed in range(3):
        with MaskPoolDropout(pool=1).attach(network, seed=seed) as attachment:
            assert torch.equal(network(x)[0] != 0, unit_mask(0, "0.weight", 50, 0.5))
            assert attachment.mask_seed == 0


def test_autocast_keeps_its_type():
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()).train()
    with MaskPoolDropout().attach(network), torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(_x(2, 2, 5, 5)).dtype == torch.bfloat16


def test_a_frozen_batch_norm_keeps_its_units():
    network = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)).train()
    network[1].eval()
    x = _x(4, 3)
    with MaskPoolDropout().attach(network):
        assert torch.equal(network(x), copy.deepcopy(network)(x))


@pytest.mark.parametrize("bad", [{"drop_rate": 1.0}, {"drop_rate": -0.1}, {"pool": 0}, {"min_keep": 0}])
def test_impossible_settings(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        MaskPoolDropout(**bad)


def test_other_settings_keep_the_contract():
    check_regularizer(MaskPoolDropout(pool=None, drop_rate=0.3, min_keep=2), compiled=False)


def test_a_network_that_is_refused_keeps_no_hooks():
    network = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(UsageError, match="exclude it"):
        MaskPoolDropout().attach(network)
    assert not network._forward_pre_hooks
    assert not network._forward_hooks


def test_a_compiled_model_that_ran_before_is_no_silent_no_op():
    torch._dynamo.reset()
    network = nn.Sequential(nn.Linear(3, 6)).train()
    compiled = torch.compile(network, backend="eager")
    compiled(_x(4, 3))
    with MaskPoolDropout().attach(compiled) as attachment:
        compiled(_x(4, 3))
        with pytest.raises(NoEffectError, match=r"call torch.compiler.reset\(\) after attaching"):
            attachment.after_step(Progress(1, 2, 1))
    torch._dynamo.reset()
