"""Recipes: what to train, prune and measure, as one validated, frozen record. Imports no torch."""

from __future__ import annotations

import hashlib
import json
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


def _named(value: Any) -> Any:
    """`magnitude` is short for `{name: magnitude}`."""
    return {"name": value} if isinstance(value, str) else value


DurationText = Annotated[str, AfterValidator(_duration)]
Sparsity = Annotated[float, Field(ge=0.0, lt=1.0)]
# A plug-in by name with its parameters; the registry's class validates them (`secateur.lab.plugins`).
Plugin = Annotated[dict[str, Any], BeforeValidator(_named)]


class DataSpec(_Spec):
    """Which data. `name` is a known set, or a folder of plain arrays or images under the data folder."""

    name: str = "digits"
    validation: float = Field(0.0, ge=0.0, lt=1.0, description="share of the training set held out to choose by")
    subset: int | None = Field(None, ge=1, description="use only this many training images, stratified")


class ModelSpec(_Spec):
    """Which network: a name from `secateur models`, `torchvision:NAME`, `timm:NAME` or `python:module:function`."""

    name: str = "digits_cnn"
    kwargs: dict[str, Any] = {}


class OptimizerSpec(_Spec):
    """SGD, Adam or AdamW; `decay_norms: false` spares biases and norm scales from weight decay."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0.0)
    momentum: float = Field(0.9, ge=0.0, lt=1.0)
    nesterov: bool = False
    weight_decay: float = Field(5e-4, ge=0.0)
    decay_norms: bool = True


class LearningRateSpec(_Spec):
    """Learning rate over the run: linear warm-up, then constant, cosine to 0, or steps by `factor`."""

    name: Literal["constant", "cosine", "step"] = "cosine"
    warmup: DurationText = "0ep"
    milestones: tuple[DurationText, ...] = ()
    factor: float = Field(0.1, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _milestones_fit(self) -> LearningRateSpec:
        if (self.name == "step") != bool(self.milestones):
            raise ValueError('milestones belong to name "step", and "step" needs at least one')
        return self


class TrainSpec(_Spec):
    """How to train (or fine-tune)."""

    duration: DurationText = "20ep"
    batch_size: int = Field(64, ge=1)
    optimizer: OptimizerSpec = OptimizerSpec()
    lr_schedule: LearningRateSpec = LearningRateSpec()
    augment: Literal["none", "crop_flip"] = "none"
    grad_clip: float | None = Field(None, gt=0.0, description="largest norm of the whole gradient")
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    checkpoint_every: DurationText = "1ep"
    evaluate_every: DurationText = "1ep"


class MethodSpec(_Spec):
    """One column of the comparison: a regularizer to train under."""

    label: str
    regularizer: Plugin = {"name": "none"}
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()


class PruneSpec(_Spec):
    """One way of pruning every trained network, at several sparsities."""

    granularity: str = "weight"
    criterion: Plugin = {"name": "magnitude"}
    scope: Literal["tensor", "global"] = "tensor"
    allocation: Literal["uniform", "erk"] = "uniform"
    rounding: Literal["prune_floor", "keep_floor", "nearest"] = "prune_floor"
    sparsities: tuple[Sparsity, ...] = (0.0, 0.5, 0.9)
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ("@last",)
    groups: Literal["all", "inner"] = Field("all", description="unit only: inner leaves residual sums alone")
    min_keep: int = Field(1, ge=0)
    latency: bool = Field(False, description="unit only: cut and time the first seed's network at each sparsity")
    recalibrate: bool = Field(False, description="re-estimate BatchNorm statistics on training data after pruning")

    @model_validator(mode="after")
    def _consistent(self) -> PruneSpec:
        from secateur.core.names import check_granularity

        check_granularity(self.granularity)
        if self.granularity != "unit" and (self.latency or self.groups != "all"):
            raise ValueError('latency and groups belong to granularity "unit": only whole units can be cut')
        if self.granularity == "unit" and self.allocation != "uniform":
            raise ValueError('granularity "unit" takes allocation "uniform"; use scope "global" for uneven widths')
        if len(set(self.sparsities)) != len(self.sparsities):
            raise ValueError("sparsities repeat a value")
        return self


class FinalSpec(_Spec):
    """The network to deliver: cut, prove, fine-tune, save, reload elsewhere, export, measure."""

    method: str = Field("best", description="a method's label, or best: highest mean accuracy at this sparsity")
    prune: int = Field(0, ge=0, description="which entry of prune (it must have granularity unit)")
    sparsity: Sparsity = 0.5
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
    prune: tuple[PruneSpec, ...] = (PruneSpec(),)
    final: FinalSpec | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        labels = [m.label for m in self.methods]
        if not labels or len(set(labels)) != len(labels):
            raise ValueError(f"methods need distinct labels, got {labels}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be distinct and at least one, got {list(self.seeds)}")
        if self.final is not None:
            if self.final.method not in ("best", *labels):
                raise ValueError(f'final.method "{self.final.method}" is no method; known: best, {", ".join(labels)}')
            tuned = self.final.fine_tune
            if tuned is not None and tuned.precision != self.train.precision:
                raise ValueError(
                    f'final.fine_tune.precision "{tuned.precision}" differs from train.precision '
                    f'"{self.train.precision}"; a run computes in one'
                )
            if self.final.prune >= len(self.prune) or self.prune[self.final.prune].granularity != "unit":
                raise ValueError("final.prune must be the number of a prune entry with granularity unit")
        return self

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
