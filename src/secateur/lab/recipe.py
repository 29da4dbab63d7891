"""Recipes: what to train, prune and measure, as one validated, frozen record. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from secateur.core.duration import Duration

__all__ = [
    "DataSpec",
    "FinalSpec",
    "LearningRateSpec",
    "MethodSpec",
    "ModelSpec",
    "OptimizerSpec",
    "PruneSpec",
    "Recipe",
    "TrainSpec",
    "canonical_hash",
]


_LONGEST = 1e12


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)


def _duration(value: str) -> str:
    duration = Duration.parse(value)
    if duration.value > _LONGEST:
        raise ValueError(f'duration "{value}" is longer than anything that ends; expected at most {_LONGEST:g}')
    return str(duration)


def _absolute(value: str) -> str:
    if value.endswith("run"):
        raise ValueError(f"{value} is a fraction of the run whose length this key sets; use ep or it")
    return value


def _named(value: Any) -> Any:
    """`magnitude` is short for `{name: magnitude}`."""
    return {"name": value} if isinstance(value, str) else value


# As text first, so that a bare number hears that it lacks a unit, not that it is no text.
DurationText = Annotated[str, BeforeValidator(str), AfterValidator(_duration)]
Sparsity = Annotated[float, Field(ge=0.0, lt=1.0)]
# A plug-in by name with its parameters; the registry's class validates them (`secateur.lab.plugins`).
Plugin = Annotated[dict[str, Any], BeforeValidator(_named)]


class DataSpec(_Spec):
    """Which data. `name` is a known set, or a folder of plain arrays or images under the data folder."""

    name: str = Field("digits", description="digits, mnist, fashion_mnist, cifar10, cifar100, or a folder")
    validation: float = Field(0.0, ge=0.0, lt=1.0, description="share of the training set held out to choose by")
    subset: int | None = Field(None, ge=1, description="use only this many training images, stratified")
    image_size: int | None = Field(None, ge=1, description="resize images of a folder to this height and width")


class ModelSpec(_Spec):
    """Which network: a name from `secateur models`, `torchvision:NAME`, `timm:NAME` or `python:module:function`."""

    name: str = Field("digits_cnn", description="which network")
    kwargs: dict[str, Any] = Field({}, description="its own arguments (`{widths: [16, 32, 64]}`)")


class OptimizerSpec(_Spec):
    """SGD, Adam or AdamW; `decay_norms: false` spares biases and norm scales from weight decay."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0.0, description="base learning rate")
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="sgd only")
    nesterov: bool = Field(False, description="sgd only, needs momentum")
    weight_decay: float = Field(5e-4, ge=0.0, description="L2 factor (adamw: decoupled)")
    decay_norms: bool = Field(True, description="decay biases and norm scales too")

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerSpec:
        if self.name != "sgd" and self.model_fields_set & {"momentum", "nesterov"}:
            raise ValueError(f"momentum and nesterov belong to sgd, not to {self.name}")
        if self.nesterov and (self.name != "sgd" or not self.momentum):
            raise ValueError("nesterov belongs to sgd with momentum above 0")
        return self


class LearningRateSpec(_Spec):
    """Learning rate over the run: linear warm-up, then constant, cosine to 0, or steps by `factor`."""

    name: Literal["constant", "cosine", "step"] = "cosine"
    warmup: DurationText = Field("0ep", description="linear warm-up from near 0")
    milestones: tuple[DurationText, ...] = Field((), description="step only: when to multiply by factor")
    factor: float = Field(0.1, gt=0.0, le=1.0, description="step only")

    @model_validator(mode="after")
    def _milestones_fit(self) -> LearningRateSpec:
        if (self.name == "step") != bool(self.milestones):
            raise ValueError('milestones belong to name "step", and "step" needs at least one')
        return self


class TrainSpec(_Spec):
    """How to train (or fine-tune)."""

    duration: Annotated[DurationText, AfterValidator(_absolute)] = Field(
        "20ep", description="length: epochs (ep) or steps (it)"
    )
    batch_size: int = Field(64, ge=1, description="images a step")
    optimizer: OptimizerSpec = OptimizerSpec()
    lr_schedule: LearningRateSpec = LearningRateSpec()
    augment: Literal["none", "crop_flip"] = Field("none", description="crop_flip: pad 4, crop, mirror")
    grad_clip: float | None = Field(None, gt=0.0, description="largest norm of the whole gradient")
    precision: Literal["32-true", "bf16-mixed"] = Field("32-true", description="bf16-mixed: autocast")
    shuffle: bool = Field(True, description="a new order every epoch; false: as stored")
    patience: int | None = Field(None, ge=1, description="stop after this many evaluations without a lower loss")
    keep: Literal["last", "best"] = Field("last", description="weights of the end, or of the lowest held-out loss")
    checkpoint_every: DurationText = Field("1ep", description="how much work a kill may cost")
    evaluate_every: DurationText = Field("1ep", description="on the validation share, else on the test set")


class LoopSpec(_Spec):
    """Train again after pruning, with the pruned weights held at zero; once for each sparsity, or in rounds.

    In rounds (`fraction` given): train, score, remove a fraction of what remains, restart, train, until too little
    is left (DropNet's algorithm 1, lottery tickets). Otherwise every sparsity of a prune entry is reached at once.
    """

    score_at: Literal["trained", "init"] = Field("trained", description="which network is scored; init: untrained")
    restart: str = Field("init", description="init, reinitialize, trained, or a duration (1ep, 500it) to rewind to")
    fraction: float | None = Field(None, gt=0.0, lt=1.0, description="share of what remains that a round removes")
    round_up: bool = Field(False, description="a round removes ceil (lottery tickets), not floor (DropNet)")
    until: float = Field(0.1, ge=0.0, lt=1.0, description="rounds end when this share or less is left")
    kappa: float | None = Field(None, gt=0.0, le=1.0, description="rounds end below this share of the first accuracy")
    rescore: int = Field(1, ge=1, description="weights: score again in so many steps on the way (SynFlow: 100)")
    shuffle_masks: bool = Field(False, description="control: the masks' entries in random order inside each layer")
    small: bool = Field(False, description="control: cut the units before training and start the small network anew")

    @model_validator(mode="after")
    def _consistent(self) -> LoopSpec:
        if self.restart not in ("init", "reinitialize", "trained"):
            _absolute(_duration(self.restart))
        if self.fraction is None and self.model_fields_set & {"until", "kappa", "round_up"}:
            raise ValueError("until, kappa and round_up belong to rounds: give fraction too")
        if self.score_at == "init" and (self.fraction is not None or self.restart == "trained"):
            raise ValueError("score_at init prunes before training: it takes no fraction and no restart trained")
        if self.rescore > 1 and self.fraction is not None:
            raise ValueError("rescore goes to a sparsity in steps without training: it takes no fraction")
        if self.small and (self.score_at != "init" or self.restart != "reinitialize"):
            raise ValueError("small is a network trained from scratch: it takes score_at init and restart reinitialize")
        return self


class MethodSpec(_Spec):
    """One column of the comparison: a regularizer to train under, and whether to train again after pruning."""

    label: str = Field(description="its name in tables and plots")
    regularizer: Plugin = Field({"name": "none"}, description="what to train under, with its parameters")
    include: tuple[str, ...] = Field(("*",), description="layers it acts on: shell patterns, @first, @last")
    exclude: tuple[str, ...] = Field((), description="layers it leaves alone")
    criterion: Plugin | None = Field(None, description="rank its networks by this, whatever the prune entry says")
    prune: tuple[int, ...] | None = Field(None, description="only these entries of prune, counted from 0; default: all")
    loop: LoopSpec | None = Field(None, description="train again after pruning")


class PruneSpec(_Spec):
    """One way of pruning every trained network, at several sparsities."""

    granularity: str = Field("weight", description="weight, unit, block:ROWSxCOLUMNS or N:M")
    criterion: Plugin = Field({"name": "magnitude"}, description="what to rank by, with its parameters")
    label: str | None = Field(None, description="its name in tables and plots; default: the criterion's")
    scope: Literal["tensor", "global", "column"] = Field(
        "tensor", description="rank inside each tensor, all together, or inside each unit's weights"
    )
    control: bool = Field(False, description="the others of the same method are compared with this one")
    ties: Literal["index", "random"] = Field("index", description="which of equal scores goes first")
    allocation: Literal["uniform", "erk"] = Field("uniform", description="how tensors share the sparsity")
    rounding: Literal["prune_floor", "keep_floor", "nearest"] = Field("prune_floor", description="of counts")
    sparsities: tuple[Sparsity, ...] = Field((0.0, 0.5, 0.9), min_length=1, description="fractions to remove")
    include: tuple[str, ...] = Field(("*",), description="layers to prune: shell patterns, @first, @last")
    exclude: tuple[str, ...] = Field(("@last",), description="layers to leave whole")
    groups: Literal["all", "inner"] = Field("all", description="unit only: inner leaves residual sums alone")
    min_keep: int = Field(1, ge=0, description="cells that every tensor keeps at least")
    latency: bool = Field(False, description="unit only: cut and time the first seed's network at each sparsity")
    recalibrate: bool = Field(False, description="re-estimate BatchNorm statistics on training data after pruning")

    @property
    def title(self) -> str:
        """What tables call its criterion."""
        return self.label or str(self.criterion.get("name"))

    @model_validator(mode="after")
    def _consistent(self) -> PruneSpec:
        from secateur.core.names import check_granularity

        check_granularity(self.granularity)
        if self.granularity != "unit" and (self.latency or self.groups != "all"):
            raise ValueError('latency and groups belong to granularity "unit": only whole units can be cut')
        if self.granularity == "unit" and self.scope == "column":
            raise ValueError('scope "column" ranks weights inside a unit; granularity "unit" takes tensor or global')
        if self.granularity == "unit" and self.allocation != "uniform":
            raise ValueError('granularity "unit" takes allocation "uniform"; use scope "global" for uneven widths')
        if self.granularity == "unit" and self.min_keep < 1:
            raise ValueError('granularity "unit" needs min_keep of at least 1: a layer without units cannot be cut')
        if self.scope == "global" and self.allocation != "uniform":
            raise ValueError('scope "global" ranks all tensors together and takes no allocation')
        if match := re.fullmatch(r"(\d+):(\d+)", self.granularity):
            only = 1.0 - int(match[1]) / int(match[2])
            if self.scope != "tensor" or self.allocation != "uniform":
                raise ValueError(f"granularity {self.granularity} takes scope tensor and allocation uniform")
            if any(abs(s - only) > 1e-9 for s in self.sparsities):
                raise ValueError(f"granularity {self.granularity} always removes {only:g}: sparsities [{only:g}]")
        if len(set(self.sparsities)) != len(self.sparsities):
            raise ValueError("sparsities repeat a value")
        return self


class FinalSpec(_Spec):
    """The network to deliver: cut, prove, fine-tune, save, reload elsewhere, export, measure."""

    method: str = Field("best", description="a method's label, or best: highest mean accuracy at this sparsity")
    prune: int = Field(0, ge=0, description="which entry of prune (it must have granularity unit)")
    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    align: int = Field(16, ge=1, description="round kept units up to a multiple of this; 1 = exactly as asked")
    fine_tune: TrainSpec | None = None
    exports: tuple[Literal["onnx", "torch_export"], ...] = ()
    batch_size: int = Field(64, ge=1, description="for latency")


class Recipe(_Spec):
    """One experiment: every seed under every method, pruned every way; then one network delivered."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)
    description: str = ""
    seeds: tuple[int, ...] = (0,)
    data: DataSpec = DataSpec()
    model: ModelSpec = ModelSpec()
    train: TrainSpec = TrainSpec()
    methods: tuple[MethodSpec, ...] = (MethodSpec(label="magnitude alone"),)
    prune: tuple[PruneSpec, ...] = Field((PruneSpec(),), min_length=1)
    final: FinalSpec | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        labels = [m.label for m in self.methods]
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(f"methods need distinct labels, got {labels}")
        for method in self.methods:
            if any(not 0 <= i < len(self.prune) for i in method.prune or ()):
                raise ValueError(
                    f'method "{method.label}": prune {list(method.prune or ())} names entries that are not there; '
                    f"there are {len(self.prune)}, counted from 0"
                )
            shapes = {p.granularity for _, p in self.ways(method)} if method.loop is not None else set()
            if not shapes <= {"weight", "unit"}:
                raise ValueError(f'method "{method.label}": a loop prunes by granularity weight or unit')
            if method.loop is not None and method.loop.rescore > 1 and shapes != {"weight"}:
                raise ValueError(f'method "{method.label}": loop.rescore needs granularity weight')
            if method.loop is not None and method.loop.small and shapes != {"unit"}:
                raise ValueError(f'method "{method.label}": loop.small needs granularity unit: weights cannot be cut')
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be distinct and at least one, got {list(self.seeds)}")
        ways = [(p.granularity, p.title, p.scope) for p in self.prune]
        if len(set(ways)) != len(ways):
            raise ValueError(
                "prune entries must differ in granularity, scope or label (by default the criterion): tables tell "
                "them apart by these"
            )
        if self.final is not None:
            if self.final.prune >= len(self.prune) or self.prune[self.final.prune].granularity != "unit":
                raise ValueError("final.prune must be the number of a prune entry with granularity unit")
            once = [m.label for m in self.methods if m.loop is None and self.final.prune in dict(self.ways(m))]
            if not once or self.final.method not in ("best", *once):
                known = ", ".join(["best", *once])
                raise ValueError(
                    f'final.method "{self.final.method}" is not pruned that way without a loop; known: {known}'
                )
            tuned = self.final.fine_tune
            if tuned is not None and tuned.precision != self.train.precision:
                raise ValueError(
                    f'final.fine_tune.precision "{tuned.precision}" differs from train.precision '
                    f'"{self.train.precision}"; a run computes in one'
                )
        return self

    def ways(self, method: MethodSpec) -> list[tuple[int, PruneSpec]]:
        """The prune entries that hold for a method, with their numbers."""
        return [(i, p) for i, p in enumerate(self.prune) if method.prune is None or i in method.prune]

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults filled in, as plain JSON data."""
        return self.model_dump(mode="json")

    @property
    def hash(self) -> str:
        """Eight hex digits that change when anything that affects the numbers does."""
        return canonical_hash({k: v for k, v in self.resolved().items() if k not in ("name", "description")})[:8]


def canonical_hash(data: Any) -> str:
    """SHA-256 of JSON data with sorted keys, as hex."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
