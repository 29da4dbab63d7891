"""What an attachment refuses at once, in one line that says what to do, and leaves as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from secateur.core.targets import find_targets
from secateur.errors import NoEffectError, UsageError
from secateur.regularizers.attachment import Attachment
from secateur.regularizers.base import Regularizer, WeightNoise
from secateur.regularizers.ddrop import DDrop
from secateur.regularizers.ddrop_scale import DDropScale
from secateur.regularizers.l0 import L0
from secateur.regularizers.network_slimming import NetworkSlimming
from secateur.regularizers.smallify import Smallify
from secateur.regularizers.targeted_dropout import TargetedDropout
from secateur.regularizers.variational_dropout import VariationalDropout
from secateur.testing.networks import batches, trainable
from secateur.testing.snapshots import same_structure, same_values, structure, values


@dataclass(frozen=True)
class Learns(Regularizer):
    module: str = "fc1"
    name: str = "gate"
    learns: ClassVar[bool] = True
    draws_noise: ClassVar[bool] = False

    def attach(self, model, targets=None, *, seed=0):
        attachment = Attachment(self, model, targets, seed)
        try:
            attachment.learn(self.module, self.name, torch.ones(3))
        except BaseException:
            attachment.remove()
            raise
        return attachment


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("0", "weight", r'Learns: learn\("0", "weight", ...\): that Linear already has "weight"; .* another name'),
        ("0", "forward", 'already has "forward"'),
        ("", "training", 'that Sequential already has "training"'),
        (
            "0.weight",
            "gate",
            r'learn\("0.weight", "gate", ...\): expected the path of a module, got none\'s; near.*"0"$',
        ),
        ("9", "gate", "expected the path of a module, got none's; pass target.module"),
        ("0", "a.b", "a parameter's name is not empty and has no dot"),
        ("0", "", "a parameter's name is not empty and has no dot"),
    ],
)
def test_a_learned_parameter_needs_a_module_and_a_free_name(module, name, message):
    net = network()
    before, state = structure(net), values(net)
    with pytest.raises(UsageError, match=message) as caught:
        Learns(module, name).attach(net)
    assert "\n" not in str(caught.value)
    same_structure("refused", before, structure(net))
    same_values("refused", state, values(net))


def test_a_bias_that_is_none_has_its_name_taken():
    with pytest.raises(UsageError, match='already has "bias"'):
        Learns("0", "bias").attach(nn.Sequential(nn.Linear(4, 3, bias=False)))


def test_learning_twice_under_one_name_leaves_the_first_alone():
    net = network()
    with Learns("0", "gate").attach(net) as first:
        with pytest.raises(UsageError, match=r'already has "gate"; if the method is attached already.*remove\(\)'):
            Learns("0", "gate").attach(net)
        assert net[0].gate is first.learned["0.gate"]
    assert not hasattr(net[0], "gate")
    Learns("", "gate").attach(net).remove()


@pytest.mark.parametrize("spec", [L0(), VariationalDropout(), Smallify(), DDropScale()], ids=lambda s: type(s).__name__)
def test_a_method_that_learns_is_attached_once(spec):
    net = trainable()
    with spec.attach(net) as first:
        learned = dict(first.learned)
        with pytest.raises(UsageError, match=r"already has|another attached method"):
            spec.attach(net)
        assert all(net.get_parameter(name) is parameter for name, parameter in learned.items())
        (net(batches(net)[0][0]).square().mean() + first.penalty()).backward()
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    spec.attach(net).remove()


@pytest.mark.parametrize("spec", [TargetedDropout(), DDrop(scores="weight_norm", l1=0), L0()], ids=str)
def test_targets_are_targets(spec):
    net = network()
    before = structure(net)
    for targets in (["0.weight"], "0.weight", [find_targets(net)[0]]):
        with pytest.raises(
            UsageError, match=rf"{type(spec).__name__}: targets is of type \w+, expected Targets; .*find_targets"
        ):
            spec.attach(net, targets)
    same_structure("refused", before, structure(net))


@pytest.mark.parametrize("spec", [DDrop(), NetworkSlimming()], ids=lambda s: type(s).__name__)
def test_a_network_without_batchnorm_is_sent_to_the_method_that_needs_none(spec):
    with pytest.raises(NoEffectError, match=rf"no prunable norm .*{type(spec).__name__} acts on .*ddrop_scale"):
        spec.attach(network())
    with pytest.raises(NoEffectError, match=r"no prunable weight parameter; nothing to do$"):
        TargetedDropout().attach(nn.Sequential(nn.ReLU()))


@dataclass(frozen=True)
class Returns(WeightNoise):
    """Multiplies by whatever `made` makes for the second layer, and the first by ones."""

    made: Any = None

    def multiplier(self, target, weight, stream, progress):
        return torch.ones_like(weight) if target.name == "0.weight" else self.made(target, weight)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda t, w: torch.ones(t.units),
            r"returned shape \[2\], expected .* weight's, \[2, 3\]: target.unrows .*spread",
        ),
        (lambda t, w: torch.ones(5, 2, 3), r"returned shape \[5, 2, 3\]"),
        (lambda t, w: torch.ones(1, 1, 3), r"returned shape \[1, 1, 3\]"),
        (lambda t, w: w / 0 * 0, "returned numbers that are not finite"),
        (lambda t, w: torch.full((1, 1), float("inf")), "returned numbers that are not finite"),
        (lambda t, w: 0.5, "returned a float, expected a tensor, or None for no change"),
    ],
)
def test_a_multiplier_that_is_none_names_method_and_target(made, message):
    net = network().train()
    state = values(net)
    with pytest.raises(UsageError, match=f'^Returns.multiplier for "2.weight" {message}'), Returns(made).attach(net):
        net(torch.ones(1, 4))
    same_values("refused", state, values(net))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "made",
    [
        lambda t, w: torch.zeros(()),
        lambda t, w: torch.tensor([0.0, 1.0, 0.5]),
        lambda t, w: torch.zeros(1, 3),
        lambda t, w: t.spread(torch.tensor([0.5, 1.0])),
        lambda t, w: torch.ones(t.shape, dtype=torch.bool),
        lambda t, w: None,
    ],
)
def test_whatever_broadcasts_is_multiplied_with_in_the_weights_type(made, dtype):
    net = network().to(dtype).train()
    factor = made(find_targets(net)["2.weight"], net[2].weight)
    expected = net[2].weight.detach() * (1.0 if factor is None else factor)
    with Returns(made).attach(net):
        y = net(torch.ones(1, 4, dtype=dtype))
        assert torch.equal(net[2].weight, expected.to(dtype))
        y.sum().backward()
    assert net[2].weight.grad.dtype == dtype
