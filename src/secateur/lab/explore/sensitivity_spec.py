"""What a recipe says about how much each layer can lose. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from secateur.lab.explore.specs import SectionSpec
from secateur.lab.train_spec import Plugin, Sparsity

__all__ = ["SensitivitySpec"]


class SensitivitySpec(SectionSpec):
    """Every layer pruned alone, all others whole: which of them can lose how much."""

    kind: Literal["sensitivity"]
    sparsities: tuple[Sparsity, ...] = Field(
        (0.5, 0.8, 0.9, 0.95, 0.99), min_length=1, description="fractions of a layer's weights to remove"
    )
    criterion: Plugin = Field({"name": "magnitude"}, description="what a layer's weights are ranked by")

    @model_validator(mode="after")
    def _distinct(self) -> SensitivitySpec:
        if len(set(self.sparsities)) < len(self.sparsities):
            raise ValueError("sparsities repeat a value")
        if not any(self.sparsities):
            raise ValueError("sparsities hold only 0, the whole layer; give one above 0")
        return self
