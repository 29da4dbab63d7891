"""Targeted Dropout's variants attached: transposed and attention layers, training, the matched control, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.core.duration import Progress
from secateur.core.targets import find_targets
from secateur.errors import UsageError
from secateur.regularizers.dropout import Dropout
from secateur.regularizers.stream import NoiseStream
from secateur.regularizers.targeted_dropout import TargetedDropout
from secateur.testing import check_regularizer

VARIANTS = [
    TargetedDropout(gamma=0.5, alpha=0.5, granularity="unit", draw="weight"),
    TargetedDropout(gamma=0.9, alpha=0.9, granularity="unit", draw="weight", ramp=True),
    TargetedDropout(keep_per_unit=3, alpha=0.5),
    TargetedDropout(keep_per_unit=2, alpha=0.9, ramp=True),
]


@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_the_variants_keep_the_contract(spec):
    check_regularizer(spec, compiled=False)


def test_the_default_draws_the_same_numbers_as_without_the_options():
    layer = nn.Linear(30, 20)
    (target,) = find_targets(layer)
    for granularity in ("weight", "unit"):
        spec = TargetedDropout(gamma=0.5, alpha=0.5, granularity=granularity)
        weight = layer.weight.detach()
        got = spec.multiplier(target, weight, NoiseStream(3), Progress(1, 1, 1)).expand_as(weight)
        norms = weight.norm(dim=1)
        if granularity == "unit":
            safe, shape = norms >= norms.sort().values[10], (1, 20)
        else:
            safe, shape = weight.abs() >= weight.abs().sort(dim=1).values[:, 15:16], (20, 30)
        coins = NoiseStream(3).bernoulli(shape, 0.5)
        expected = safe | coins if granularity == "weight" else (safe | coins[0])[:, None].expand_as(weight)
        assert torch.equal(got, expected)


def test_units_of_transposed_and_grouped_layers():
    for layer in (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Conv2d(4, 6, 3, groups=2)):
        (target,) = find_targets(layer)
        weight = layer.weight.detach()
        spec = TargetedDropout(gamma=0.5, alpha=1.0, granularity="unit", draw="weight")
        rows = target.rows(spec.multiplier(target, weight, NoiseStream(0), Progress(1, 1, 1)))
        norms = target.rows(weight).norm(dim=1)
        assert torch.equal((rows == 0).all(1), norms <= norms.sort().values[2])
        kept = TargetedDropout(keep_per_unit=2, alpha=1.0).multiplier(target, weight, NoiseStream(0), Progress(1, 1, 1))
        assert target.rows(kept).sum(1).tolist() == [2] * 6


def test_attention_candidates_lie_inside_each_head():
    layer = nn.MultiheadAttention(8, 2)
    target = find_targets(layer)["in_proj_weight"]
    spec = TargetedDropout(gamma=0.5, alpha=1.0, granularity="unit", draw="weight")
    got = spec.multiplier(target, layer.in_proj_weight.detach(), NoiseStream(0), Progress(1, 1, 1))
    dropped = (got == 0).all(1).reshape(6, 4)
    assert dropped.sum(1).tolist() == [2] * 6


def test_layers_with_fewer_weights_than_k_are_left_alone():
    network = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).train()
    x = torch.randn(4, 3)
    plain = network(x)
    with TargetedDropout(keep_per_unit=5, alpha=1.0).attach(network):
        assert torch.equal(network(x), plain)


def test_the_matched_control():
    for spec in (TargetedDropout(0.5, 0.5), TargetedDropout(0.66, 0.75, granularity="unit", draw="weight")):
        control = Dropout.matched(spec)
        assert control.drop_rate == spec.gamma * spec.alpha
        assert control.granularity == spec.granularity
    with pytest.raises(UsageError, match=r"keep_per_unit=3 .* another share in each layer"):
        Dropout.matched(TargetedDropout(keep_per_unit=3))


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"draw": "column"}, "draw"),
        ({"keep_per_unit": -1}, "at least 0"),
        ({"keep_per_unit": 3, "granularity": "unit"}, "for granularity weight; got 3"),
    ],
)
def test_impossible_settings(bad, words):
    with pytest.raises(UsageError, match=words):
        TargetedDropout(**bad)
