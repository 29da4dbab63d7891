"""Every registered plug-in keeps its contract; so do small third-party ones; and every check can fail."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch

from secateur.core.duration import Progress
from secateur.core.masks import Masks
from secateur.core.targets import find_targets
from secateur.criteria import CRITERIA
from secateur.criteria.base import Criterion
from secateur.criteria.magnitude import Magnitude
from secateur.errors import CheckpointError, NoEffectError, UnknownNameError, UsageError
from secateur.regularizers import REGULARIZERS
from secateur.regularizers.attachment import Attachment, Hook
from secateur.regularizers.base import Regularizer, WeightNoise
from secateur.regularizers.ddrop import DDrop
from secateur.regularizers.dropout import Dropout
from secateur.regularizers.gradual_pruning import GradualPruning
from secateur.regularizers.l0 import L0
from secateur.regularizers.mask_pool import MaskPoolDropout
from secateur.regularizers.none import NoRegularizer
from secateur.regularizers.smallify import Smallify
from secateur.regularizers.soft_filter_pruning import SoftFilterPruning
from secateur.regularizers.targeted_dropout import TargetedDropout
from secateur.regularizers.weight_swap import WeightSwap
from secateur.testing import check_criterion, check_regularizer
from secateur.testing.networks import trainable
from secateur.testing.snapshots import same_structure, structure


@pytest.mark.parametrize("name", CRITERIA.names())
def test_registered_criteria_keep_the_contract(name):
    check_criterion(CRITERIA.load(name)())


@pytest.mark.parametrize("name", REGULARIZERS.names())
def test_registered_regularizers_keep_the_contract(name):
    check_regularizer(REGULARIZERS.load(name)())


@pytest.mark.parametrize(
    "spec",
    [
        TargetedDropout(gamma=0.5, alpha=0.5, granularity="unit"),
        TargetedDropout(gamma=0.9, alpha=0.9, ramp=True),
        TargetedDropout(gamma=1.0, alpha=1.0),
        Dropout(drop_rate=0.3, granularity="unit"),
        DDrop(keep_min=0.2, schedule="linear", per_sample=False, rescale=True),
        DDrop(keep_min=0.2, schedule="cosine", l1=0.0),
        DDrop(keep_min=0.2, scores="weight_norm", l1=0.0),
        TargetedDropout(granularity="unit", draw="weight"),
        TargetedDropout(keep_per_unit=3),
        GradualPruning(granularity="unit", end=1.0, updates=4),
        SoftFilterPruning(schedule="exponential"),
        MaskPoolDropout(pool=None),
        L0(granularity="weight"),
        Smallify(granularity="weight"),
    ],
    ids=str,
)
def test_other_settings_keep_the_contract(spec):
    if spec == TargetedDropout(gamma=1.0, alpha=1.0):
        # Everything is dropped always: the one setting whose noise cannot differ between seeds.
        with pytest.raises(AssertionError, match="two seeds gave the same training"):
            check_regularizer(spec, compiled=False)
    else:
        check_regularizer(spec, compiled=False)


# Third-party plug-ins: a criterion in ten lines, a regularizer in fifty.


@dataclass(frozen=True)
class SignalToNoise(Criterion):
    """Mean |activation| over its standard deviation."""

    epsilon: float = 1e-6
    needs: ClassVar = frozenset({"mean_abs", "variance"})
    granularities: ClassVar = ("unit",)
    summary: ClassVar = "mean |activation| over its standard deviation"

    def score(self, evidence):
        return evidence.mean_abs / (evidence.variance.sqrt() + self.epsilon)


@dataclass(frozen=True)
class InputNoise(Regularizer):
    """Drops entries of every target layer's input, with an L2 penalty on the targets."""

    drop_rate: float = 0.25
    l2: float = 1e-3
    summary: ClassVar = "drops layer inputs"

    def attach(self, model, targets=None, *, seed=0):
        return _InputDropper(self, model, targets, seed)


class _InputDropper(Attachment):
    def __init__(self, spec, model, targets, seed):
        super().__init__(spec, model, targets, seed)
        self._noise = {}
        for target in self.targets:
            module = self.network.get_submodule(target.module)
            self._handles.append(module.register_forward_pre_hook(Hook(self._dropper(target.name))))

    def _dropper(self, name):
        def drop(module, args):
            if not module.training or name not in self._noise:
                return None
            (x,) = args
            noise = self._noise[name]
            return (x * noise.reshape(1, -1, *([1] * (x.dim() - 2))),)

        return drop

    def begin(self, args, kwargs):
        for target in self.targets:
            module = self.network.get_submodule(target.module)
            width = module.in_features if target.kind == "linear" else module.in_channels
            self._noise[target.name] = self.stream.bernoulli((width,), 1.0 - self.spec.drop_rate).float()

    def end(self):
        self._noise.clear()

    def penalty(self):
        return self.spec.l2 * sum(p.square().sum() for p in self.parameters.values())


def test_a_third_party_criterion_and_regularizer_pass():
    check_criterion(SignalToNoise())
    check_regularizer(InputNoise())


# Each check can fail: a plug-in broken in exactly one way, and the words it must be told.


@dataclass
class _NotFrozen(Criterion):
    summary: ClassVar = "x"

    def score(self, evidence):
        return evidence.weight.abs()


@dataclass(frozen=True)
class _Plain(Criterion):
    summary: ClassVar = "x"

    def score(self, evidence):
        return evidence.weight.abs()


@dataclass(frozen=True)
class _TensorField(_Plain):
    prior: torch.Tensor = field(default_factory=lambda: torch.ones(2))


@dataclass(frozen=True)
class _Nameless(_Plain):
    summary: ClassVar = ""


@dataclass(frozen=True)
class _UnknownNeed(_Plain):
    needs: ClassVar = frozenset({"hessian"})


@dataclass(frozen=True)
class _MutableNeeds(_Plain):
    needs: ClassVar = {"weights"}


@dataclass(frozen=True)
class _OddGranularity(_Plain):
    granularities: ClassVar = ("row",)


@dataclass(frozen=True)
class _OddPool(_Plain):
    pool: str = "max"


@dataclass(frozen=True)
class _Undeclared(_Plain):
    def score(self, evidence):
        return evidence.gradient * evidence.weight


@dataclass(frozen=True)
class _Unrepeatable(_Plain):
    def score(self, evidence):
        return evidence.weight.abs() + torch.from_numpy(np.random.default_rng().random(1)).float()


@dataclass(frozen=True)
class _GlobalRandom(_Plain):
    def score(self, evidence):
        torch.manual_seed(0)
        return torch.rand(evidence.weight.shape)


@dataclass(frozen=True)
class _Infinite(_Plain):
    def score(self, evidence):
        return (evidence.weight * 0).reciprocal()


@dataclass(frozen=True)
class _WrongShape(_Plain):
    def score(self, evidence):
        return evidence.weight.abs().flatten()


@dataclass(frozen=True)
class _PerUnitUnclaimed(_Plain):
    granularities: ClassVar = ("weight",)

    def score(self, evidence):
        return evidence.target.rows(evidence.weight).norm(dim=1)


@dataclass(frozen=True)
class _Integer(_Plain):
    def score(self, evidence):
        return (evidence.weight * 1000).long()


@dataclass(frozen=True)
class _WritesWeights(_Plain):
    def score(self, evidence):
        return evidence.weight.abs_()


@dataclass(frozen=True)
class _WritesEvidence(_Plain):
    needs: ClassVar = frozenset({"mean_abs"})
    granularities: ClassVar = ("unit",)

    def score(self, evidence):
        return evidence.mean_abs.add_(1.0)


@dataclass(frozen=True)
class _UpsideDown(_Plain):
    def score(self, evidence):
        return -evidence.weight.abs()


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (_NotFrozen(), "frozen dataclass"),
        (_TensorField(), "do not go through JSON"),
        (_Nameless(), "summary is empty"),
        (_UnknownNeed(), "needs .*hessian.* does not know"),
        (_MutableNeeds(), "expected a frozenset"),
        (_OddGranularity(), "granularities"),
        (_OddPool(), "pool 'max'"),
        (_Undeclared(), "failed: TypeError"),
        (_Unrepeatable(), "differs when computed again"),
        (_GlobalRandom(), "global random generator"),
        (_Infinite(), "not finite"),
        (_WrongShape(), "failed: UsageError.*returned shape"),
        (_PerUnitUnclaimed(), "do not allow"),
        (_Integer(), "dtype torch.int64"),
        (_WritesWeights(), "scoring changed the model: .* differs"),
        (_WritesEvidence(), "wrote into evidence.mean_abs"),
        (_UpsideDown(), "higher must mean keep"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Criterion) else "",
)
def test_a_broken_criterion_is_told_what_broke(criterion, message):
    with pytest.raises(AssertionError, match=message):
        check_criterion(criterion)


@dataclass(frozen=True)
class _Broken(Regularizer):
    """Works, but for one thing named by `how`."""

    how: str = ""
    summary: ClassVar = "broken on purpose"

    def attach(self, model, targets=None, *, seed=0):
        return _BrokenAttachment(self, model, targets, seed)


class _BrokenAttachment(_InputDropper):
    def __init__(self, spec, model, targets, seed):
        self.how = spec.how
        object.__setattr__(spec, "drop_rate", 0.25)
        object.__setattr__(spec, "l2", float("nan") if self.how == "nan penalty" else 0.0)
        super().__init__(spec, model, targets, 0 if self.how == "one seed" else seed)
        self.count = 0
        if self.how == "plain hook":
            function = self._before_forward
            self._handles.append(model.register_forward_pre_hook(lambda m, a, k: function(m, a, k), with_kwargs=True))
            for target in self.targets:
                module = self.network.get_submodule(target.module)
                self._handles.append(module.register_forward_pre_hook(self._dropper(target.name)))
        if self.how == "extra parameter":
            model.register_parameter("gate", torch.nn.Parameter(torch.ones(1)))
        if self.how == "keeps a hook":
            model.register_forward_hook(lambda *_: None)
        if self.how == "keeps an attribute":
            model.extra = 1

    def _dropper(self, name):
        drop = super()._dropper(name)

        def noisy_in_eval(module, args):
            noise = self._noise.get(name)
            return None if noise is None else (args[0] * noise.reshape(1, -1, *([1] * (args[0].dim() - 2))),)

        return noisy_in_eval if self.how == "eval noise" else drop

    def _before_forward(self, module, args, kwargs):
        self._forwards += 1
        if self.how == "eval noise" or (module.training and torch.is_grad_enabled()):
            self.begin(args, kwargs)
        else:
            self.end()

    def begin(self, args, kwargs):
        self.count += 1
        if self.how == "no noise":
            return
        super().begin(args, kwargs)
        if self.how == "global noise":
            for name, noise in self._noise.items():
                self._noise[name] = torch.bernoulli(torch.full(noise.shape, 0.75))
        if self.how == "hidden state" and self.count > 5:
            for noise in self._noise.values():
                noise.zero_()
        if self.how == "clears gradients":
            for parameter in self.parameters.values():
                parameter.grad = None
        if self.how == "casts" and torch.is_autocast_enabled("cpu"):
            for parameter in self.parameters.values():
                parameter.data = parameter.data.bfloat16()
        if self.how == "weights in place":
            with torch.no_grad():
                for parameter in self.parameters.values():
                    parameter.mul_(0.5)
        if self.how == "unfreezes":
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)
        if self.how == "steps the frozen":
            with torch.no_grad():
                for parameter in self.parameters.values():
                    if not parameter.requires_grad:
                        parameter.mul_(0.5)

    def after_step(self, progress):
        if self.how == "silent":
            self._forwards = 1
            self._inside.clear()
        super().after_step(progress)

    def state_dict(self):
        return {**super().state_dict(), "text": "x"} if self.how == "text state" else super().state_dict()

    def penalty(self):
        return super().penalty() * (0 if self.how != "nan penalty" else 1)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("extra parameter", "attaching changed the model's state_dict keys"),
        ("keeps a hook", "attach then remove left a trace: hooks"),
        ("keeps an attribute", "attach then remove left a trace: attributes"),
        ("weights in place", "removed in the middle of a step it left other weights"),
        ("eval noise", "in eval mode"),
        ("plain hook", "deep copy"),
        ("no noise", "says it draws noise.*or say draws_noise = False"),
        ("one seed", "two seeds.*the noise ignores its seed; .*or say draws_noise = False"),
        ("global noise", "trained twice with one seed|global random generator"),
        ("hidden state", "resumed from its state"),
        ("text state", "other things than tensors"),
        ("unfreezes", "frozen parameters"),
        ("steps the frozen", "frozen parameters changed"),
        ("silent", "went unnoticed"),
        ("clears gradients", "do not add up"),
        ("casts", "under autocast .* became torch.bfloat16"),
        ("nan penalty", "penalty.. is nan"),
    ],
)
def test_a_broken_regularizer_is_told_what_broke(how, message):
    with pytest.raises(AssertionError, match=message):
        check_regularizer(_Broken(how=how), compiled=False)


def test_the_broken_regularizer_without_its_fault_passes():
    check_regularizer(_Broken(), compiled=False)


@dataclass(frozen=True)
class _BreaksTheGraph(InputNoise):
    def attach(self, model, targets=None, *, seed=0):
        attachment = super().attach(model, targets, seed=seed)
        network = attachment.network

        def look(module, args):
            return args if float(args[0].sum()) > 0 else None

        attachment._handles.append(next(network.children()).register_forward_pre_hook(Hook(look)))
        return attachment


def test_a_regularizer_that_breaks_the_graph_is_told_so():
    check_regularizer(_BreaksTheGraph(), compiled=False)
    with pytest.raises(AssertionError, match="fullgraph"):
        check_regularizer(_BreaksTheGraph())


@dataclass(frozen=True)
class _SilentlyCompiledAway(InputNoise):
    def attach(self, model, targets=None, *, seed=0):
        attachment = super().attach(model, targets, seed=seed)
        attachment._inside.clear()
        return attachment


def test_a_regularizer_whose_hooks_a_compiled_model_ignores_is_told_so():
    with pytest.raises(AssertionError, match="ran before, it neither acts fully nor raises"):
        check_regularizer(_SilentlyCompiledAway())


class _NoClosure(WeightSwap):
    def _then_end(self, closure):
        return closure

    def end(self):
        # Without the guard against lost updates.
        self._restore()


class _NoStep(WeightSwap):
    def _before_step(self, optimizer, args, kwargs):
        return None

    def end(self):
        self._restore()


class _NoSave(WeightSwap):
    def pause(self):
        if not self.saving:
            super().pause()

    saving = False

    def __init__(self, spec, model, targets, seed):
        super().__init__(spec, model, targets, seed)

        def saving(value):
            self.saving = value

        self._handles.append(model.register_state_dict_pre_hook(lambda *_: saving(True)))
        model._state_dict_pre_hooks.move_to_end(self._handles[-1].id, last=False)
        self._handles.append(model.register_state_dict_post_hook(lambda *_: saving(False)))


@dataclass(frozen=True)
class _BrokenSwap(WeightNoise):
    """Weight noise whose attachment forgets to put the plain weights back in one place."""

    how: str = ""
    summary: ClassVar = "broken on purpose"

    def multiplier(self, target, weight, stream, progress):
        return target.spread(stream.bernoulli((target.units,), 0.5).float())

    def attach(self, model, targets=None, *, seed=0):
        kinds = {"closure": _NoClosure, "step": _NoStep, "save": _NoSave}
        return kinds.get(self.how, WeightSwap)(self, model, targets, seed)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("closure", r"optimizer.step\(closure\) did not update the plain weights"),
        ("step", "step 0: the optimizer did not update the plain weights"),
        ("save", r"state_dict\(\) within a step holds .* with noise in it"),
    ],
)
def test_noise_left_in_the_weights_is_found(how, message):
    check_regularizer(_BrokenSwap(), compiled=False)
    with pytest.raises(AssertionError, match=message):
        check_regularizer(_BrokenSwap(how=how), compiled=False)


# Errors of the registry and of attachments.


def test_unknown_names_list_the_nearest():
    with pytest.raises(UnknownNameError, match=r'unknown criterion "magnitud".*nearest: magnitude'):
        CRITERIA.load("magnitud")
    with pytest.raises(UnknownNameError, match=r'unknown regularizer "targeted".*targeted_dropout'):
        REGULARIZERS.load("targeted")
    with pytest.raises(UsageError, match="did not allow"):
        CRITERIA.load("python:os:system")


@pytest.mark.parametrize(
    "make",
    [
        lambda: TargetedDropout(gamma=1.5),
        lambda: TargetedDropout(alpha=-0.1),
        lambda: TargetedDropout(granularity="filter"),
        lambda: Dropout(drop_rate=1.0),
        lambda: DDrop(keep_min=0.9, keep_max=0.5),
        lambda: DDrop(l1=-1),
        lambda: DDrop(schedule="cubic"),
        lambda: Magnitude(order=3),
    ],
)
def test_impossible_settings_are_refused_at_once(make):
    with pytest.raises(UsageError):
        make()


@pytest.mark.parametrize("name", REGULARIZERS.names())
@pytest.mark.parametrize("halfway", [False, True])
def test_an_attachment_that_is_refused_leaves_no_trace(name, halfway, monkeypatch):
    spec, network = REGULARIZERS.load(name)(), trainable()
    before = structure(network)
    with spec.attach(network) as attachment:
        kind, learn = type(attachment), Attachment.learn

    class Refused(kind):
        def __init__(self, *args):
            super().__init__(*args)
            raise UsageError("refused")

    def learn_once(self, *args):
        if self.learned:
            raise UsageError("refused")
        return learn(self, *args)

    if halfway:
        monkeypatch.setattr(Attachment, "learn", learn_once)
    with pytest.raises(UsageError, match="refused"):
        Refused(spec, network, None, 0)
    same_structure(name, before, structure(network))
    monkeypatch.undo()
    # Nor does anything else stay behind that the next one could trip over.
    spec.attach(network).remove()
    same_structure(name, before, structure(network))


class _Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = torch.nn.MultiheadAttention(4, 2), torch.nn.BatchNorm1d(4)
        self.wide = torch.nn.Linear(4, 4)


@pytest.mark.parametrize("name", REGULARIZERS.names())
def test_targets_that_a_method_refuses_keep_nothing_of_it(name):
    spec, network = REGULARIZERS.load(name)(), _Attention().train()
    before, refused = structure(network), []
    for targets in (find_targets(network), find_targets(network, kind="norm")):
        try:
            spec.attach(network, targets).remove()
        except UsageError:
            refused.append(targets.names)
        same_structure(f"{name}: {targets}", before, structure(network))
    only_some = {"ddrop", "ddrop_scale", "network_slimming", "mask_pool", "l0", "variational_dropout", "smallify"}
    assert bool(refused) == (name in only_some), refused


def test_attachment_errors():
    network = torch.nn.Sequential(torch.nn.Linear(3, 2))
    with pytest.raises(NoEffectError, match="no prunable norm"):
        DDrop().attach(network)
    norm = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    with pytest.raises(UsageError, match="not a BatchNorm scale"):
        DDrop().attach(norm, find_targets(norm))
    with NoRegularizer().attach(network) as none:
        assert none.penalty() == 0.0
        assert none.scores() == {}
        none.after_step(Progress(1, 2, 1))
        assert none.finalize() is None or isinstance(none.finalize(), Masks)
    attachment = TargetedDropout().attach(network)
    with pytest.raises(CheckpointError, match="expected"):
        attachment.load_state_dict({"progress": torch.zeros(3)})
    attachment.remove()
