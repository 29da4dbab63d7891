"""Evidence gathered in one streaming pass, against a naive computation that stores everything."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.granularity import Block, Unit, Weight
from secateur.core.targets import find_targets
from secateur.criteria.base import Criterion
from secateur.criteria.bn_gamma import BnGamma
from secateur.criteria.driver import cell_scores, gather_evidence, score_targets
from secateur.criteria.magnitude import Magnitude
from secateur.criteria.mean_activation import MeanActivation
from secateur.criteria.random import Random
from secateur.criteria.saliency import Saliency
from secateur.criteria.statistics import ActivationStatistics
from secateur.criteria.taylor import Taylor
from secateur.errors import DataError, UsageError

ALL = frozenset({"mean_abs", "variance", "zero_fraction", "gradients", "activation_gradients"})
STATISTICS = frozenset({"mean_abs", "variance", "zero_fraction"})


class Recording(nn.Module):
    """A network whose forward notes each target's activation with `self.note(name, tensor, axis)`."""

    def __init__(self):
        super().__init__()
        self.notes = {}

    def note(self, name, tensor, axis=1):
        # A copy for the values, since in-place functions may overwrite them; the tensor for its gradient.
        if self.recording:
            if tensor.requires_grad:
                tensor.retain_grad()
            self.notes.setdefault(name, []).append((tensor.detach().clone(), tensor, axis))
        return tensor

    recording = False


class Plain(Recording):
    shape = (3, 6, 6)

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.fc, self.head = nn.Conv2d(6, 4, 3), nn.Linear(16, 5), nn.Linear(5, 3)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.note("conv1.weight", self.relu(self.bn1(self.conv1(x))))
        x = self.note("conv2.weight", F.gelu(self.conv2(F.max_pool2d(x, 2, stride=1))))
        x = F.max_pool2d(x, 2, stride=1, ceil_mode=True)
        x = self.note("fc.weight", torch.tanh(self.fc(x.flatten(1)[:, :16])), -1)
        return self.note("head.weight", self.head(x), -1)


class Residual(Recording):
    """In-place additions and in-place ReLUs; the activation is what leaves the layer before the addition."""

    shape = (4, 5, 5)

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.short, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.note("conv1.weight", self.act(self.bn1(self.conv1(x))) * 1)
        y = self.note("conv2.weight", self.bn2(self.conv2(y)) * 1)
        s = self.note("short.weight", self.short(x) * 1)
        y = y + s if self.recording else self._in_place(y, s)
        y = F.relu(y, inplace=not self.recording)
        return self.note("head.weight", self.head(y.mean((2, 3))), -1)

    @staticmethod
    def _in_place(y, s):
        y += s
        return y


class ResidualBare(Residual):
    """The same without the multiplications, as networks are really written."""

    def forward(self, x):
        if self.recording:
            return super().forward(x)
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        y += self.short(x)
        return self.head(self.act(y).mean((2, 3)))


class Grouped(Recording):
    shape = (4, 5, 5)

    def __init__(self):
        super().__init__()
        self.grouped, self.depth = nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8)
        self.up, self.head = nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Linear(24, 3)

    def forward(self, x):
        x = self.note("grouped.weight", torch.relu(self.grouped(x)))
        x = self.note("depth.weight", F.leaky_relu(self.depth(x), 0.1))
        x = self.note("up.weight", F.hardtanh(self.up(x)))
        return self.note("head.weight", self.head(x.flatten(1)), -1)


class OneDimensional(Recording):
    shape = (2, 9)

    def __init__(self):
        super().__init__()
        self.conv, self.up, self.head = nn.Conv1d(2, 4, 3), nn.ConvTranspose1d(4, 3, 2), nn.Linear(24, 3)

    def forward(self, x):
        x = self.note("conv.weight", F.relu(self.conv(x)))
        x = self.note("up.weight", torch.sigmoid(self.up(x)))
        return self.note("head.weight", self.head(x.flatten(1)), -1)


class ThreeDimensional(Recording):
    shape = (2, 4, 4, 4)

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv3d(2, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.note("conv.weight", F.relu6(self.conv(x)))
        return self.note("head.weight", self.head(x.mean((2, 3, 4))), -1)


class Tokens(Recording):
    """Linear layers on [samples, tokens, features], with functional calls and LayerNorm."""

    shape = (5, 6)

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.note("up.weight", F.gelu(F.linear(x, self.up.weight, bias=self.up.bias)), -1)
        h = self.note("down.weight", F.linear(input=h, weight=self.down.weight), -1)
        return self.note("head.weight", self.head(self.norm(x + h).mean(1)), -1)


class Tied(Recording):
    """One layer called twice: its statistics are over both calls."""

    shape = (6,)

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        for _ in range(2):
            x = self.note("cell.weight", F.relu(self.cell(x)), -1)
        return self.note("head.weight", self.head(x), -1)


NETWORKS = [Plain, Residual, ResidualBare, Grouped, OneDimensional, ThreeDimensional, Tokens, Tied]


def _network(kind):
    torch.manual_seed(2)
    network = kind()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return network.double().train()


def _data(network, sizes=(4, 4, 3)):
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(n, *network.shape, generator=generator, dtype=torch.float64),
            torch.randint(3, (n,), generator=generator),
        )
        for n in sizes
    ]


def _units_first(tensor, axis):
    return tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)


def _naive(network, batches):
    """Every activation and gradient of all samples, kept; then the definitions, literally."""
    network = copy.deepcopy(network).eval()
    network.recording = True
    acts, products, gradients, samples = {}, {}, {}, 0
    for x, y in batches:
        network.notes.clear()
        network.zero_grad()
        F.cross_entropy(network(x), y, reduction="sum").backward()
        samples += len(x)
        for name, notes in network.notes.items():
            for value, tensor, axis in notes:
                acts.setdefault(name, []).append(_units_first(value, axis))
                product = (value * tensor.grad).movedim(axis, 1)
                per_sample = product.flatten(2).mean(2) if product.dim() > 2 else product
                products.setdefault(name, []).append(per_sample.abs().sum(0))
        for name, parameter in network.named_parameters():
            gradients[name] = gradients.get(name, 0) + (0 if parameter.grad is None else parameter.grad.clone())
    found = {}
    for name in acts:
        a = torch.cat(acts[name], 1)
        found[name] = {
            "mean_abs": a.abs().mean(1),
            "variance": a.var(1, unbiased=True),
            "zero_fraction": (a == 0).double().mean(1),
            "activation_gradient": sum(products[name]) / samples,
            "gradient": gradients[name] / samples,
        }
    return found


@pytest.mark.parametrize("kind", NETWORKS)
def test_evidence_equals_the_naive_computation(kind):
    network = _network(kind)
    batches, targets = _data(network), find_targets(network)
    expected = _naive(network, batches)
    assert set(expected) == set(targets.names)
    evidence = gather_evidence(network, targets, ALL, batches=batches)
    for name, fields in expected.items():
        for field, value in fields.items():
            torch.testing.assert_close(
                getattr(evidence[name], field),
                value,
                rtol=1e-6,
                atol=1e-9,
                msg=lambda m, n=name, f=field: f"{n} {f}: {m}",
            )
    # Without a backward pass, the same statistics.
    again = gather_evidence(network, targets, STATISTICS, batches=(x for x, _ in batches))
    for name in targets.names:
        for field in STATISTICS:
            torch.testing.assert_close(getattr(again[name], field), getattr(evidence[name], field))


def test_batch_sizes_do_not_matter():
    network = _network(Plain)
    x = torch.cat([x for x, _ in _data(network)])
    y = torch.cat([y for _, y in _data(network)])
    targets = find_targets(network)
    whole = gather_evidence(network, targets, ALL, batches=[(x, y)])
    for sizes in ([11], [1] * 11, [7, 1, 3], [0, 5, 0, 6, 0]):
        parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
        split = gather_evidence(network, targets, ALL, batches=parts)
        for name in targets.names:
            for field in ("mean_abs", "variance", "zero_fraction", "activation_gradient", "gradient"):
                torch.testing.assert_close(getattr(split[name], field), getattr(whole[name], field))


@pytest.mark.parametrize("kind", [Plain, ResidualBare])
def test_the_model_is_left_as_it_was(kind):
    network = _network(kind)
    network.conv1.eval()
    network.conv2.weight.requires_grad_(False)
    network.conv1.weight.grad = torch.ones_like(network.conv1.weight)
    state = copy.deepcopy(network.state_dict())
    modes = [m.training for m in network.modules()]
    flags = [p.requires_grad for p in network.parameters()]
    random_state = torch.get_rng_state()
    gather_evidence(network, find_targets(network), ALL, batches=_data(network))
    assert all(torch.equal(v, state[n]) for n, v in network.state_dict().items())
    assert [m.training for m in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == flags
    assert torch.equal(network.conv1.weight.grad, torch.ones_like(network.conv1.weight))
    assert network.conv2.weight.grad is None
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in network.modules())
    assert all(not p._backward_hooks for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_error_in_the_pass_puts_everything_back():
    network = _network(Plain)
    network.conv2.weight.requires_grad_(False)
    with pytest.raises(RuntimeError):
        gather_evidence(network, find_targets(network), ALL, batches=[(torch.ones(2, 9), torch.zeros(2).long())])
    assert network.training
    assert not network.conv2.weight.requires_grad
    # And the observer is no longer watching.
    network(_data(network)[0][0])


def test_a_frozen_model_is_scored_all_the_same():
    network = _network(Plain)
    expected = gather_evidence(network, find_targets(network), ALL, batches=_data(network))
    network.requires_grad_(False)
    with torch.no_grad():
        frozen = gather_evidence(network, find_targets(network), ALL, batches=_data(network))
    for name, evidence in frozen.items():
        torch.testing.assert_close(evidence.gradient, expected[name].gradient)
        torch.testing.assert_close(evidence.activation_gradient, expected[name].activation_gradient)
    assert not any(p.requires_grad for p in network.parameters())


def test_scoring_in_a_step_of_an_attached_regularizer_sees_the_plain_network():
    from secateur.regularizers.targeted_dropout import TargetedDropout

    network = _network(Plain)
    network.bn1.momentum = 0.0
    expected = gather_evidence(network, find_targets(network), ALL, batches=_data(network))
    x, y = _data(network)[0]
    with TargetedDropout().attach(network):
        for backward in (False, True):
            loss = F.cross_entropy(network(x), y)
            if backward:
                loss.backward()
            for needs in (STATISTICS, ALL):
                attached = gather_evidence(network, find_targets(network), needs, batches=_data(network))
                for name, evidence in attached.items():
                    torch.testing.assert_close(evidence.mean_abs, expected[name].mean_abs)
                    if needs == ALL:
                        torch.testing.assert_close(evidence.gradient, expected[name].gradient)
                        torch.testing.assert_close(evidence.activation_gradient, expected[name].activation_gradient)


def test_nothing_is_stored():
    network = _network(Plain)
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append(weakref.ref(x))
            return x

    network.relu = nn.Sequential(nn.ReLU(), Watch())
    alive = []

    def batches():
        for batch in _data(network) * 2:
            yield batch
            gc.collect()
            # The activation of this batch must be gone before the next batch is asked for.
            alive.append(sum(r() is not None for r in seen))

    evidence = gather_evidence(network, find_targets(network), ALL, batches=batches())
    assert len(seen) == 6
    assert alive == [0] * 6
    for item in evidence.values():
        stored = [item.mean_abs, item.variance, item.zero_fraction, item.activation_gradient]
        assert all(
            t.shape == (item.target.units,) and t.untyped_storage().nbytes() <= 8 * item.target.units for t in stored
        )
        assert not any(t.requires_grad for t in (*stored, item.gradient))


def test_norms_follow_their_layers():
    network = _network(ResidualBare)
    targets = find_targets(network, include=["conv1", "conv2"])
    calls = []

    def batches():
        for batch in _data(network):
            calls.append(1)
            yield batch

    evidence = gather_evidence(network, targets, frozenset({"norm"}), batches=batches())
    assert torch.equal(evidence["conv1.weight"].norm_scale, network.bn1.weight)
    assert torch.equal(evidence["conv2.weight"].norm_scale, network.bn2.weight)
    assert len(calls) == 1, "one batch shows which BatchNorm follows which layer"
    with pytest.raises(UsageError, match=r'"short.weight" cannot be scored: no BatchNorm follows it'):
        gather_evidence(network, find_targets(network), frozenset({"norm"}), batches=_data(network))


def test_variance_of_activations_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    x = 30 + torch.randn(2000, 3, generator=generator)
    found = ActivationStatistics(["variance"])
    for part in x.split(100):
        found.update(part, -1)
    torch.testing.assert_close(found.variance, x.double().var(0), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("batches", "needs", "error", "message"),
    [
        (None, STATISTICS, UsageError, "need data; pass batches"),
        ([], STATISTICS, DataError, "batches are empty"),
        ([(torch.empty(0, 6), torch.empty(0).long())], ALL, DataError, "batches are empty"),
        ([torch.ones(2, 6)], ALL, UsageError, "need labels"),
        ([(torch.full((2, 6), float("nan")), torch.zeros(2).long())], ALL, DataError, "loss is nan after 0 samples"),
    ],
)
def test_bad_data_is_refused_in_one_line(batches, needs, error, message):
    network = _network(Tied).float()
    with pytest.raises(error, match=message):
        gather_evidence(network, find_targets(network), needs, batches=batches)


def test_a_layer_the_data_never_reaches_is_named():
    network = _network(Tied).float()
    network.unused = nn.Linear(2, 2)
    batches = [(torch.ones(2, 6), torch.zeros(2).long())]
    with pytest.raises(UsageError, match=r'"unused.weight" cannot be scored: its activation was never seen'):
        gather_evidence(network, find_targets(network), STATISTICS, batches=batches)
    with pytest.raises(UsageError, match=r'"unused.weight" cannot be scored: no gradient reached it'):
        gather_evidence(network, find_targets(network), frozenset({"gradients"}), batches=batches)


# Scores.


def test_one_pass_serves_all_criteria():
    network = _network(Plain)
    targets = find_targets(network)
    passes = []

    def batches():
        passes.append(1)
        yield from _data(network)

    criteria = [Magnitude(), MeanActivation(), Taylor(), Saliency(), Random()]
    together = score_targets(network, targets, criteria, batches=batches())
    assert len(passes) == 1
    for criterion, scores in zip(criteria, together, strict=True):
        (alone,) = score_targets(network, targets, [criterion], batches=_data(network))
        for name in targets.names:
            torch.testing.assert_close(scores[name], alone[name])


def test_scores_by_their_definitions():
    network = _network(Plain)
    targets = find_targets(network)
    naive = _naive(network, _data(network))
    magnitude, first, mean_abs, taylor, raw, saliency = score_targets(
        network,
        targets,
        [Magnitude(2), Magnitude(1), MeanActivation(), Taylor(), Taylor(normalize=False), Saliency()],
        batches=_data(network),
    )
    units = cell_scores(Magnitude(2), Unit(), targets, magnitude)
    sums = cell_scores(Magnitude(1), Unit(), targets, first)
    salient = cell_scores(Saliency(), Unit(), targets, saliency)
    for target in targets:
        name, weight = target.name, network.get_parameter(target.name).detach()
        rows = target.rows(weight)
        torch.testing.assert_close(units[name], rows.norm(dim=1))
        torch.testing.assert_close(sums[name], rows.abs().sum(1))
        torch.testing.assert_close(mean_abs[name], naive[name]["mean_abs"])
        torch.testing.assert_close(raw[name], naive[name]["activation_gradient"])
        torch.testing.assert_close(taylor[name].norm(), torch.tensor(1.0).double())
        torch.testing.assert_close(taylor[name] * raw[name].norm(), raw[name])
        expected = (naive[name]["gradient"] * weight).abs()
        torch.testing.assert_close(saliency[name], expected)
        torch.testing.assert_close(salient[name], target.rows(expected).sum(1))


def test_random_scores_depend_on_seed_and_layer_alone():
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    targets = find_targets(network)
    (one,) = score_targets(network, targets, [Random()], seed=1)
    (again,) = score_targets(network, targets, [Random()], seed=1)
    (other,) = score_targets(network, targets, [Random()], seed=2)
    assert torch.equal(one["0.weight"], again["0.weight"])
    assert not torch.equal(one["0.weight"], other["0.weight"])
    assert not torch.equal(one["0.weight"], one["1.weight"])
    (alone,) = score_targets(network, find_targets(network, ["1"]), [Random()], seed=1)
    assert torch.equal(one["1.weight"], alone["1.weight"])
    values = np.concatenate([one[n].numpy().ravel() for n in one])
    assert values.min() >= 0
    assert values.max() < 1


def test_unit_scores_do_not_serve_weights():
    network = _network(Plain)
    targets = find_targets(network, include=["conv1"])
    (scores,) = score_targets(network, targets, [BnGamma()], batches=_data(network))
    assert cell_scores(BnGamma(), Unit(), targets, scores)["conv1.weight"].shape == (6,)
    for granularity in (Weight(), Block(1, 3)):
        with pytest.raises(UsageError, match=r"BnGamma gives one score per unit.*use granularity unit"):
            cell_scores(BnGamma(), granularity, targets, scores)


def test_a_wrong_shape_is_told():
    class Flat(Criterion):
        def score(self, evidence):
            return evidence.weight.flatten()

    network = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(UsageError, match=r"Flat.score returned shape \[12\] for 0.weight"):
        score_targets(network, find_targets(network), [Flat()])
