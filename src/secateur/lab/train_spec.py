"""The parts of a recipe that say what is trained, on what, and how. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from secateur.core.duration import Duration

__all__ = [
    "DataSpec",
    "DurationText",
    "LearningRateSpec",
    "ModelSpec",
    "OptimizerSpec",
    "Plugin",
    "Sparsity",
    "Spec",
    "TrainSpec",
    "check_absolute",
    "check_duration",
]


_LONGEST = 1e12


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False)

    def _changed(self, *names: str) -> bool:
        """Whether one of these keys differs from its default; a resolved recipe names them all."""
        return any(getattr(self, name) != type(self).model_fields[name].default for name in names)


def check_duration(value: str) -> str:
    duration = Duration.parse(value)
    if duration.value > _LONGEST:
        raise ValueError(f'duration "{value}" is longer than anything that ends; expected at most {_LONGEST:g}')
    return str(duration)


def check_absolute(value: str) -> str:
    if value.endswith("run"):
        raise ValueError(f"{value} is a fraction of the run whose length this key sets; use ep or it")
    return value


def _named(value: Any) -> Any:
    """`magnitude` is short for `{name: magnitude}`."""
    return {"name": value} if isinstance(value, str) else value


# As text first, so that a bare number hears that it lacks a unit, not that it is no text.
DurationText = Annotated[str, BeforeValidator(str), AfterValidator(check_duration)]
Sparsity = Annotated[float, Field(ge=0.0, lt=1.0)]
# A plug-in by name with its parameters; the registry's class validates them (`secateur.lab.plugins`).
Plugin = Annotated[dict[str, Any], BeforeValidator(_named)]


class DataSpec(Spec):
    """Which data. `name` is a known set, or a folder of plain arrays or images under the data folder."""

    name: str = Field("digits", description="digits, mnist, fashion_mnist, cifar10, cifar100, or a folder")
    validation: float = Field(0.0, ge=0.0, lt=1.0, description="share of the training set held out to choose by")
    subset: int | None = Field(None, ge=1, description="use only this many training images, stratified")
    image_size: int | None = Field(None, ge=1, description="resize images of a folder to this height and width")


class ModelSpec(Spec):
    """Which network: a name from `secateur models`, `torchvision:NAME`, `timm:NAME` or `python:module:function`."""

    name: str = Field("digits_cnn", description="which network")
    kwargs: dict[str, Any] = Field({}, description="its own arguments (`{widths: [16, 32, 64]}`)")


class OptimizerSpec(Spec):
    """SGD, Adam or AdamW; `decay_norms: false` spares biases and norm scales from weight decay."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(0.1, gt=0.0, description="base learning rate")
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="sgd only")
    nesterov: bool = Field(False, description="sgd only, needs momentum")
    weight_decay: float = Field(5e-4, ge=0.0, description="L2 factor (adamw: decoupled)")
    decay_norms: bool = Field(True, description="decay biases and norm scales too")

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> OptimizerSpec:
        if self.name != "sgd" and self._changed("momentum", "nesterov"):
            raise ValueError(f"momentum and nesterov belong to sgd, not to {self.name}")
        if self.nesterov and (self.name != "sgd" or not self.momentum):
            raise ValueError("nesterov belongs to sgd with momentum above 0")
        return self


class LearningRateSpec(Spec):
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


class TrainSpec(Spec):
    """How to train (or fine-tune)."""

    duration: Annotated[DurationText, AfterValidator(check_absolute)] = Field(
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
