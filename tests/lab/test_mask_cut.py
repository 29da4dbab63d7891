"""Networks cut along unit masks: equal to the training pass under the mask, on every kind of network, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.core.targets import find_targets
from secateur.errors import EquivalenceError, UsageError, VacuousProofError
from secateur.lab.explore.mask_cut import cut_by_mask, pool_masks, removable, removed_share
from secateur.lab.models import build_model
from secateur.regularizers.mask_pool import MaskPoolDropout, unit_mask
from secateur.surgery import load_pruned, save_pruned, trace_groups

RATES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def _x(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _drawn(network, seed=0):
    """Every parameter and statistic drawn: zero heads and identity norms would make equality say nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            spread = 1.0 if parameter.ndim < 2 else (2.0 / parameter[0].numel()) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        for name, buffer in network.named_buffers():
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
            elif buffer.is_floating_point():
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return network.eval()


def _plain(norm=False):
    def block(inputs, outputs):
        norms = [nn.BatchNorm2d(outputs)] if norm else []
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=not norm), *norms, nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(3, 16), *block(16, 24), nn.Flatten(), nn.Linear(96, 40), nn.ReLU(), nn.Linear(40, 5))


def _mlp():
    return nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 24), nn.ReLU(), nn.Linear(24, 4))


class Residual(nn.Module):
    """Stem and second convolution make the same units."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.a, self.bn1 = nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 24, 3, padding=1)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = torch.relu(self.bn0(self.stem(x)))
        x = torch.relu(x + self.b(torch.relu(self.bn1(self.a(x)))))
        return self.head(x.mean((2, 3)))


NETWORKS = {
    "plain": (_plain, (6, 3, 8, 8)),
    "BatchNorm": (lambda: _plain(norm=True), (6, 3, 8, 8)),
    "linear": (_mlp, (6, 6)),
    "residual": (Residual, (6, 3, 6, 6)),
    "grouped": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 32, 1), nn.ReLU(), nn.Conv2d(32, 24, 3, groups=2), nn.Flatten(), nn.Linear(384, 3)
        ),
        (6, 3, 6, 6),
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(200, 3)),
        (6, 3, 4, 4),
    ),
}


def _training_pass(network, x, rate, seed, targets):
    """By the regularizer itself, one seed of a pool after another until the one that is wanted comes."""
    twin = copy.deepcopy(network).eval()
    with MaskPoolDropout(rate, seed + 1).attach(twin, targets) as attachment, attachment.sampling(), torch.no_grad():
        while True:
            out = twin(x)
            if attachment.mask_seed == seed:
                return out


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.8])
def test_a2_the_cut_network_is_the_one_that_was_trained_under_the_mask(name, rate):
    make, shape = NETWORKS[name]
    network, x = _drawn(make()), _x(*shape)
    before = {n: t.clone() for n, t in network.state_dict().items()}
    targets = find_targets(network, exclude=["@last"])
    for seed in (2, 5):
        cut = cut_by_mask(network, rate, seed, x)
        expected = _training_pass(network, x, rate, seed, targets)
        with torch.no_grad():
            got = cut.network(x)
        difference = float((got - expected).abs().max())
        assert difference <= 1e-5 * float(expected.abs().max())
        assert abs(difference - cut.max_abs_diff) <= 1e-6 * cut.scale
        assert cut.scale == pytest.approx(float(expected.abs().max()))
        assert cut.inputs == 6
        assert cut.parameters_after == sum(p.numel() for p in cut.network.parameters()) < cut.parameters_before
    assert all(torch.equal(before[n], t) for n, t in network.state_dict().items())


def test_a2_in_training_mode_proper():
    # Without BatchNorm nothing but the mask tells training mode from evaluation.
    network, x = _drawn(_plain()), _x(6, 3, 8, 8)
    cut = cut_by_mask(network, 0.5, 0, x)
    with MaskPoolDropout(0.5, 1).attach(network.train(), find_targets(network, exclude=["@last"])):
        expected = network(x).detach()
    torch.testing.assert_close(cut.network(x), expected, rtol=1e-5, atol=1e-5)


def test_the_survivors_are_multiplied_and_flattened_columns_go():
    network, x = _drawn(_plain()), _x(4, 3, 8, 8)
    cut = cut_by_mask(network, 0.5, 3, x)
    second = unit_mask(3, "3.weight", 24, 0.5)
    dense = unit_mask(3, "7.weight", 40, 0.5)
    columns = torch.cat([torch.arange(c * 4, (c + 1) * 4) for c in second.nonzero().flatten().tolist()])
    assert torch.equal(cut.network[7].weight, 2 * network[7].weight[dense][:, columns])
    assert torch.equal(cut.network[7].bias, 2 * network[7].bias[dense])
    assert torch.equal(cut.network[9].weight, network[9].weight[:, dense])
    assert torch.equal(cut.network[9].bias, network[9].bias)


def test_behind_a_batch_norm_the_factor_is_in_its_scale_and_shift():
    network, x = _drawn(_plain(norm=True)), _x(4, 3, 8, 8)
    cut = cut_by_mask(network, 0.5, 3, x)
    kept = unit_mask(3, "0.weight", 16, 0.5)
    assert torch.equal(cut.network[0].weight, network[0].weight[kept])
    assert torch.equal(cut.network[1].weight, 2 * network[1].weight[kept])
    assert torch.equal(cut.network[1].bias, 2 * network[1].bias[kept])
    assert torch.equal(cut.network[1].running_var, network[1].running_var[kept])


def test_in_a_residual_sum_a_unit_goes_where_all_its_layers_drop_it():
    network, x = _drawn(Residual()), _x(4, 3, 6, 6)
    cut = cut_by_mask(network, 0.6, 0, x)
    stem, b = (unit_mask(0, f"{layer}.weight", 24, 0.6) for layer in ("stem", "b"))
    together = stem | b
    assert 0 < int((~together).sum()) < 24
    assert cut.network.head.in_features == cut.network.stem.out_channels == int(together.sum())
    assert cut.network.a.out_channels == int(unit_mask(0, "a.weight", 16, 0.6).sum())
    # What only one of them drops stays, and comes from that one as zero.
    assert torch.equal(cut.network.b.bias == 0, ~b[together])
    assert torch.equal(cut.network.bn0.weight == 0, ~stem[together])
    # A layer that is not masked drops nothing.
    alone = cut_by_mask(network, 0.6, 0, x, targets=find_targets(network, exclude=["@last", "b"]))
    assert alone.network.stem.out_channels == 24


def test_layers_of_residual_sums_can_be_left_whole():
    network, x = _drawn(Residual()), _x(4, 3, 6, 6)
    groups = trace_groups(network, x[:1])
    inner = find_targets(network, include=[p for g in groups.inner() for p in g.producers])
    assert inner.names == ["a.weight"]
    cut = cut_by_mask(network, 0.6, 0, x, targets=inner, groups=groups.inner())
    assert cut.network.stem.out_channels == 24
    assert torch.equal(cut.network.b.bias, network.b.bias)
    assert cut.network.a.out_channels == int(unit_mask(0, "a.weight", 16, 0.6).sum())


def test_blocks_of_a_grouped_convolution_keep_equally_many():
    make, shape = NETWORKS["grouped"]
    network, x = _drawn(make()), _x(*shape)
    for seed in range(6):
        cut = cut_by_mask(network, 0.5, seed, x)
        kept = unit_mask(seed, "2.weight", 24, 0.5).reshape(2, 12)
        assert cut.network[2].out_channels == 2 * int(kept.sum(1).max())


def test_a3_rate_zero_is_the_network_itself_and_no_cut():
    network, x = _drawn(_plain(norm=True)), _x(4, 3, 8, 8)
    cut = cut_by_mask(network, 0.0, 7, x)
    assert cut.plan is None
    assert cut.removed == cut.max_abs_diff == 0.0
    assert all(
        torch.equal(a, b) for a, b in zip(*(n.state_dict().values() for n in (network, cut.network)), strict=True)
    )
    assert all(bool(k.all()) for k in cut.kept.values())


def test_a4_the_same_seed_gives_the_same_cut_and_higher_rates_cut_more_of_it():
    network, x = _drawn(_plain()), _x(4, 3, 8, 8)
    first, again = (cut_by_mask(network, 0.5, 8, x) for _ in range(2))
    assert first.plan == again.plan
    assert all(torch.equal(a, b) for a, b in zip(*(c.network.parameters() for c in (first, again)), strict=True))
    assert cut_by_mask(network, 0.5, 9, x).plan != first.plan
    sizes, kept = [], None
    for rate in RATES:
        cut = cut_by_mask(network, rate, 8, x)
        sizes.append(cut.parameters_after)
        if kept is not None:
            assert all(bool((cut.kept[n] <= kept[n]).all()) for n in kept)
        kept = cut.kept
    assert sizes == sorted(sizes, reverse=True)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(0, 2**40), st.sampled_from(sorted(NETWORKS)))
def test_any_mask_of_any_network_is_cut_exactly(rate, seed, name):
    make, shape = NETWORKS[name]
    network, x = _drawn(make()).double(), _x(*shape).double()
    try:
        cut = cut_by_mask(network, rate, seed, x)
    except VacuousProofError:
        # So little is left that the output is the same for all inputs.
        assert rate > 0.6
        return
    assert cut.max_abs_diff <= 1e-12 * max(cut.scale, 1.0)
    assert cut.removed == pytest.approx(removed_share(network, cut.plan))


@pytest.mark.parametrize(
    ("network", "shape", "said"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 9), nn.Sigmoid(), nn.Linear(9, 4)), (5, 6), "not nothing to what reads it"),
        (
            lambda: nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)),
            (5, 6),
            "not nothing to what reads it",
        ),
    ],
)
def test_units_that_are_not_zero_where_they_are_read_are_refused(network, shape, said):
    with pytest.raises(EquivalenceError, match=said) as caught:
        cut_by_mask(_drawn(network()), 0.5, 1, _x(*shape))
    assert "\n" not in str(caught.value)


def test_layers_whose_units_cannot_be_removed_are_named():
    network, x = _drawn(_mlp()), _x(4, 6)
    with pytest.raises(UsageError, match=r'layer "4" cannot be cut: .*output of the network; exclude the layer') as one:
        cut_by_mask(network, 0.5, 1, x, targets=find_targets(network))
    assert "\n" not in str(one.value)
    deep = _drawn(nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(96, 2)))
    with pytest.raises(UsageError, match=r'layer "1" cannot be cut: .*depthwise'):
        cut_by_mask(deep, 0.5, 1, _x(4, 3, 6, 6))


def test_a_network_that_was_cut_is_saved_and_loaded(tmp_path):
    model = build_model("digits_cnn", num_classes=10, in_shape=(1, 8, 8), kwargs={"widths": [4, 6, 8]}, seed=0).eval()
    x = _x(8, 1, 8, 8)
    cut = cut_by_mask(model, 0.5, 1, x)
    assert cut.plan is not None
    path = save_pruned(
        tmp_path / "cut.safetensors",
        cut.network,
        builder="secateur.lab.models:build_model",
        kwargs={
            "name": "digits_cnn",
            "num_classes": 10,
            "in_shape": [1, 8, 8],
            "kwargs": {"widths": [4, 6, 8]},
            "seed": 0,
        },
        plan=cut.plan,
        inputs=x[:1],
    )
    with torch.no_grad():
        assert torch.equal(load_pruned(path)(x), cut.network(x))


def test_the_network_is_left_alone_while_it_is_trained():
    network, x = _drawn(_plain(norm=True)), _x(4, 3, 8, 8)
    targets = find_targets(network, exclude=["@last"])
    with MaskPoolDropout(0.5, 3).attach(network, targets, seed=0) as attachment:
        network.train()
        network(x)
        cut = cut_by_mask(network, 0.5, attachment.mask_seed, x, targets=targets)
        assert all(m.training for m in network.modules())
        assert not any(m.training for m in cut.network.modules())
        assert cut.removed > 0


def test_what_all_layers_of_a_group_drop_by_hand():
    network = Residual()
    groups = trace_groups(network, _x(1, 3, 6, 6))
    targets = find_targets(network, exclude=["@last"])
    kept = pool_masks(targets, 0.0, 0)
    kept["stem.weight"][:5] = False
    kept["b.weight"][3:9] = False
    stays = removable(groups, targets, kept)
    assert (~stays["stem.weight"]).nonzero().flatten().tolist() == [3, 4]
    assert bool(stays["a.weight"].all())
