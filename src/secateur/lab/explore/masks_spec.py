"""What a recipe says about pruning along unit masks. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from secateur.lab.explore.specs import SectionSpec
from secateur.lab.train_spec import Sparsity, Spec

__all__ = ["MaskRaceSpec", "MasksSpec"]

MaskSeed = Annotated[int, Field(ge=0)]


class MaskRaceSpec(Spec):
    """The best of many masks, found by racing; it is cut, proven, saved and reloaded."""

    rate: float = Field(0.5, gt=0.0, lt=1.0, description="drop rate of all masks")
    candidates: int = Field(1000, ge=2, description="how many masks: those of the first seeds")
    known: bool = Field(True, description="let masks the network was trained with take part")
    error: float = Field(0.01, gt=0.0, lt=1.0, description="chance, at most, of losing the best one")
    first: int = Field(50, ge=2, description="images that all candidates are tried on")
    random: int = Field(50, ge=2, description="further masks, never raced, whose mean stands beside the winner")


class MasksSpec(SectionSpec):
    """Mask-guided structural pruning: the network cut along masks it was trained with, others, and by L2 norm."""

    kind: Literal["masks"]
    rates: tuple[Sparsity, ...] = Field(
        (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), min_length=1, description="drop rates"
    )
    known: tuple[MaskSeed, ...] | None = Field(
        None, description="seeds the network was trained with; default: the pool, where the regularizer is mask_pool"
    )
    unseen: int = Field(10, ge=1, description="how many seeds it was not trained with: the first that are not known")
    groups: Literal["all", "inner"] = Field(
        "all",
        description="inner: leave the layers of residual sums whole; all: such units go where all layers drop them",
    )
    race: MaskRaceSpec | None = Field(None, description="also race many masks for the best")

    @model_validator(mode="after")
    def _distinct(self) -> MasksSpec:
        for name in ("rates", "known"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise ValueError(f"{name} repeat a value")
        if not any(self.rates):
            raise ValueError("rates hold only 0, the whole network; give one above 0")
        return self
