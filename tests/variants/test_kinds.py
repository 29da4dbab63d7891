"""Variants as records, and what each does to the weights: worked numbers, and networks made by hand."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.core.seeds import keyed_seed
from secateur.criteria.magnitude import Magnitude
from secateur.errors import SecateurError, UsageError
from secateur.variants import (
    DropLayer,
    DropUnit,
    DropUnits,
    LayerSparsity,
    NoisyPrune,
    UnitMasks,
    UnitsByCriterion,
    Workbench,
    variant_from,
)
from secateur.variants import noise as noise_module
from secateur.variants.noise import add_noise, standard_normal

A = [0.5, -0.2, 0.05, 1.0]
B = [0.3, -0.6, 0.01, 0.02, 0.7, -0.1]
NOISE = {
    "a.weight": [0.1, 0.15, -0.04, 0.0],
    "b.weight": [-0.25, 0.0, 0.06, -0.03, 0.0, -0.2],
}


class Pair(nn.Module):
    """The two layers of the worked example."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 1, bias=False), nn.Linear(6, 1, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([A]))
            self.b.weight.copy_(torch.tensor([B]))


def _weights(network):
    return [p.detach().flatten().tolist() for p in network.parameters()]


@pytest.fixture
def worked_noise(monkeypatch):
    def fixed(weight, sigma, seed, name, out):
        return torch.add(weight, torch.tensor(NOISE[name]).reshape(weight.shape), alpha=float(sigma != 0), out=out)

    monkeypatch.setattr(noise_module, "add_noise", fixed)


@pytest.mark.parametrize(
    ("weights", "mask", "expected"),
    [
        ("noisy", "noisy", [[0.6, 0, 0, 1], [0, -0.6, 0, 0, 0.7, -0.3]]),
        ("dense", "noisy", [[0.5, 0, 0, 1], [0, -0.6, 0, 0, 0.7, -0.1]]),
        ("noisy", "dense", [[0.6, 0, 0, 1], [0.05, -0.6, 0, 0, 0.7, 0]]),
        ("dense", "dense", [[0.5, 0, 0, 1], [0.3, -0.6, 0, 0, 0.7, 0]]),
    ],
)
def test_stochastic_pruning_and_mask_transfer_as_worked_out(worked_noise, weights, mask, expected):
    network = Pair()
    with Workbench(network).variant(NoisyPrune(1.0, 0.5, weights=weights, mask=mask)):
        found = _weights(network)
    for got, wanted in zip(found, expected, strict=True):
        assert got == pytest.approx(wanted)
    assert _weights(network) == [pytest.approx(A), pytest.approx(B)]


@pytest.mark.parametrize(
    ("sparsity", "gone"), [(0.3, {0.01, 0.02, 0.05}), (0.5, {0.01, 0.02, 0.05, 0.1, 0.2}), (0.0, set())]
)
def test_without_noise_it_is_global_magnitude_pruning(sparsity, gone):
    network = Pair()
    with Workbench(network).variant(NoisyPrune(0.0, sparsity, seed=7)):
        found = [v for row in _weights(network) for v in row]
    expected = [0.0 if any(math.isclose(abs(v), g) for g in gone) else v for v in A + B]
    assert found == pytest.approx(expected)


def _net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[1].bias)
    return net.eval()


def _x(n=5):
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(n))


@torch.no_grad()
def test_without_noise_it_is_the_network_to_the_bit():
    network, x = _net(), _x()
    network[0].weight[0, 0, 0, 0] = -0.0
    before = [p.clone() for p in network.parameters()]
    with Workbench(network).variant(NoisyPrune(0.0, 0.0, seed=3)) as model:
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert math.copysign(1.0, float(network[0].weight[0, 0, 0, 0])) == -1.0
        assert torch.equal(model(x), network(x))


@torch.no_grad()
def test_only_targets_get_noise_and_each_its_own():
    network = _net()
    clean = {n: p.clone() for n, p in network.named_parameters()}
    bench = Workbench(network)
    with bench.variant(NoisyPrune(0.1, 0.0, seed=1)):
        for name, parameter in network.named_parameters():
            if name in {t.name for t in bench.targets}:
                z = torch.from_numpy(standard_normal(parameter.numel(), 1, name) * np.float32(0.1))
                assert torch.equal(parameter, clean[name] + z.reshape(parameter.shape))
            else:
                assert torch.equal(parameter, clean[name])


@torch.no_grad()
def test_the_variance_of_noisy_weights_is_the_sum_of_both():
    weight = torch.linspace(-1, 1, 200_001)
    noisy = add_noise(weight, 0.5, 0, "w", torch.empty_like(weight))
    # Standard error of a variance: var sqrt(2 / n), here 0.2 %; four of them.
    assert float(noisy.var()) == pytest.approx(float(weight.var()) + 0.25, rel=0.008)


@torch.no_grad()
def test_unit_masks_equal_the_training_pass_of_the_mask_pool():
    from secateur.regularizers.mask_pool import MaskPoolDropout

    # BatchNorm in eval mode in both: the masks are the question.
    network, x = _net(), _x()
    twin = copy.deepcopy(network)
    bench = Workbench(twin, batches=[(x, torch.zeros(5, dtype=torch.long))])
    targets = bench.targets
    with MaskPoolDropout(drop_rate=0.4, pool=5).attach(network, targets, seed=3) as attachment:
        for _ in range(4):
            with attachment.sampling(), torch.no_grad():
                network.eval()
                out = network(x)
            with bench.variant(UnitMasks(0.4, attachment.mask_seed)) as model:
                torch.testing.assert_close(model(x), out)


def test_unit_masks_are_nested_and_the_same_again():
    network = _net()
    bench = Workbench(network, batches=[(_x(), torch.zeros(5, dtype=torch.long))])

    def alive(rate, seed=4):
        with bench.variant(UnitMasks(rate, seed, scaled=False)) as model:
            return torch.cat([model[1].weight != 0, model[3].bias != 0, model[5].bias != 0])

    assert torch.equal(alive(0.5), alive(0.5))
    for low, high in [(0.0, 0.3), (0.3, 0.6), (0.6, 0.9)]:
        assert bool((alive(high) <= alive(low)).all())
    assert bool(alive(0.0).all())
    assert int(alive(0.9).sum()) >= 3


@torch.no_grad()
def test_a_dropped_unit_and_a_dropped_layer_are_zero_where_they_come_out():
    network, x = _net(), _x()
    bench = Workbench(network, batches=[(x, torch.zeros(5, dtype=torch.long))])
    assert bench.sites["0.weight"].module == "1"
    seen = []
    network[2].register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
    network(x)
    with bench.variant(DropUnit("0", 2)) as model:
        model(x)
    plain, without = seen
    assert bool((without[:, 2] == 0).all())
    keep = [0, 1, 3, 4, 5]
    torch.testing.assert_close(without[:, keep], plain[:, keep])
    with bench.variant(DropLayer("3")) as model:
        torch.testing.assert_close(model(x), model[5].bias.expand(5, 3))


@torch.no_grad()
def test_a_dead_unit_can_be_dropped_without_a_trace():
    network, x = _net(), _x()
    network[3].weight[1].zero_()
    network[3].bias[1] = 0.0
    out = network(x)
    bench = Workbench(network, batches=[(x, torch.zeros(5, dtype=torch.long))])
    with bench.variant(DropUnit("3", 1)) as model:
        assert torch.equal(model(x), out)


@torch.no_grad()
def test_one_layer_is_pruned_and_no_other():
    network = _net()
    bench = Workbench(network)
    with bench.variant(LayerSparsity("3", 0.25)) as model:
        assert int((model[3].weight == 0).sum()) == math.floor(0.25 * model[3].weight.numel())
        assert not bool((model[0].weight == 0).any())


def test_named_criteria_come_first():
    network = _net()
    bench = Workbench(network, criteria={"mine": Magnitude(order=1)})
    with bench.variant(NoisyPrune(0.0, 0.5, criterion="mine")) as model:
        found = _weights(model)
    with bench.variant(NoisyPrune(0.0, 0.5)) as model:
        assert _weights(model) == found
    with pytest.raises(SecateurError, match="magnitude"), bench.variant(NoisyPrune(0.0, 0.5, criterion="magnitud")):
        pass


VARIANTS = st.one_of(
    st.builds(
        NoisyPrune,
        sigma=st.floats(0, 10),
        sparsity=st.floats(0, 1, exclude_max=True),
        seed=st.integers(0, 2**62),
        weights=st.sampled_from(["noisy", "dense"]),
        mask=st.sampled_from(["noisy", "dense"]),
    ),
    st.builds(UnitMasks, st.floats(0, 1, exclude_max=True), st.integers(0, 99)),
    st.builds(DropUnit, st.text(), st.integers(0, 99)),
    st.builds(DropLayer, st.text()),
    st.builds(LayerSparsity, st.text(), st.floats(0, 1, exclude_max=True)),
)


@settings(max_examples=50, deadline=None)
@given(VARIANTS)
def test_records_go_through_json(variant):
    again = variant_from(json.loads(json.dumps(variant.record())))
    assert again == variant
    assert hash(again) == hash(variant)
    assert str(variant).startswith(variant.kind)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, np.array])
def test_integers_of_other_types_are_stored_as_plain_ones(kind):
    for variant, plain in (
        (NoisyPrune(0.1, 0.5, seed=kind(3)), NoisyPrune(0.1, 0.5, seed=3)),
        (UnitMasks(0.5, kind(3), min_keep=kind(2)), UnitMasks(0.5, 3, min_keep=2)),
        (DropUnit("0", kind(1)), DropUnit("0", 1)),
        (DropUnits((("0", kind(1)),)), DropUnits((("0", 1),))),
        (UnitsByCriterion(removed={"0": kind(1)}), UnitsByCriterion(removed={"0": 1})),
    ):
        assert variant == plain
        assert hash(variant) == hash(plain)
        assert json.dumps(variant.record()) == json.dumps(plain.record())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: NoisyPrune(-0.1, 0.5), "sigma is a number at least 0 and finite, got -0.1"),
        (lambda: NoisyPrune(math.nan, 0.5), "sigma"),
        (lambda: NoisyPrune(math.inf, 0.5), "sigma"),
        (lambda: NoisyPrune(0.1, 1.0), "sparsity is a number in [0, 1), got 1.0"),
        (lambda: NoisyPrune(0.1, 0.5, seed=-1), "seed is an integer, at least 0, got -1"),
        (lambda: NoisyPrune(0.1, 0.5, weights="loud"), "noisy"),
        (lambda: UnitMasks(1.0), "drop_rate"),
        (lambda: DropUnit("x", -1), "unit"),
        (lambda: NoisyPrune(0.1, 0.5, seed=np.int64(-1)), "seed is an integer, at least 0"),
        (lambda: NoisyPrune(0.1, 0.5, seed=1.0), "seed is an integer, at least 0, got 1.0"),
        (lambda: NoisyPrune(0.1, 0.5, seed=True), "seed is an integer, at least 0, got True"),
        (lambda: NoisyPrune(0.1, 0.5, scope="globl"), 'unknown scope "globl"; nearest: global'),
        (lambda: NoisyPrune(0.1, 0.5, mask=["noisy"]), "unknown mask"),
        (lambda: NoisyPrune(0.1, 0.5, criterion=None), "criterion is a name, got None"),
        (lambda: UnitMasks(0.5, scaled="no"), "scaled is True or False, got 'no'"),
        (lambda: DropUnit(3, 1), "layer is a name, got 3"),
        (lambda: DropLayer(3), "layer is a name, got 3"),
        (lambda: LayerSparsity(3, 0.5), "layer is a name, got 3"),
        (lambda: DropUnits(3), "units is pairs of a layer's name and a number, got 3"),
        (lambda: DropUnits(((3, 0),)), "units is pairs of a layer's name"),
        (lambda: variant_from({"kind": ["x"]}), "unknown variant \"['x']\""),
        (lambda: variant_from({"kind": "drop_layer", "layer": "x", 3: 1}), 'unknown "3"'),
        (lambda: variant_from(["drop_layer"]), "a record is a mapping with a kind, got ['drop_layer']"),
        (lambda: variant_from({"kind": "noisy"}), "noisy_prune"),
        (lambda: variant_from({"kind": "drop_layer"}), "layer"),
        (lambda: variant_from({"kind": "drop_layer", "layer": "x", "unit": 3}), 'unknown "unit"'),
    ],
)
def test_bad_numbers_get_one_line(make, said):
    with pytest.raises(SecateurError) as caught:
        make()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_units_and_layers_that_are_not_there():
    bench = Workbench(_net(), batches=[(_x(), torch.zeros(5, dtype=torch.long))])
    with pytest.raises(UsageError, match="units 0 to 5, got 6"), bench.variant(DropUnit("0", 6)):
        pass
    with pytest.raises(SecateurError, match="layer"), bench.variant(DropLayer("9")):
        pass
    with (
        pytest.raises(UsageError, match="inside another"),
        bench.variant(DropLayer("0")),
        bench.variant(DropLayer("3")),
    ):
        pass
    with pytest.raises(UsageError, match="pass batches="), Workbench(_net()).variant(DropUnit("0", 1)):
        pass


def test_a_failure_leaves_the_network_as_it_was():
    network = _net()
    before = [p.data_ptr() for p in network.parameters()]
    bench = Workbench(network)
    with pytest.raises(SecateurError), bench.variant(NoisyPrune(0.1, 0.5, criterion="taylor")):
        pass
    with pytest.raises(RuntimeError), bench.variant(NoisyPrune(0.1, 0.5)):
        raise RuntimeError
    assert [p.data_ptr() for p in network.parameters()] == before
    with bench.variant(NoisyPrune(0.1, 0.5)):
        pass


def test_noise_is_normal_and_begins_alike():
    z = standard_normal(100_001, 5, "w")
    assert np.array_equal(z[:33_000], standard_normal(33_000, 5, "w"))
    assert not np.array_equal(z, standard_normal(100_001, 6, "w"))
    from scipy import stats

    assert stats.kstest(z.astype(float), "norm").pvalue > 1e-3
    # A change of these bits would be a change of every variant there is.
    assert standard_normal(4, 0, "w").view(np.uint32).tolist() == [3215432816, 3218259871, 1062284665, 1066357712]
    words = np.random.SFC64(keyed_seed(0, "gaussian", "w")).random_raw(2)
    parts = [int(word) >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    first, second = (np.float32(stats.norm.ppf((part + 0.5) / 65536)) for part in parts[:2])
    assert standard_normal(1, 0, "w")[0] == (first + second) * np.float32(0.5**0.5)
