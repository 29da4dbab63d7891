"""What a recipe says about the greedy oracle. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from secateur.lab.explore.specs import SectionSpec
from secateur.lab.train_spec import Plugin

__all__ = ["OracleSpec"]


class OracleSpec(SectionSpec):
    """Units dropped one by one, as a greedy search finds them, as criteria rank them, and at random; no retraining."""

    kind: Literal["oracle"]
    images: int = Field(512, ge=2, description="training images whose loss the search looks at")
    steps: int | None = Field(None, ge=1, description="units to drop, at most; default: as until says")
    until: float | None = Field(None, ge=0.0, lt=1.0, description="share of units left at the end; default: 0.1")
    min_keep: int = Field(1, ge=1, description="units that stay in every layer")
    exclude: tuple[str, ...] = Field(
        ("@last",), description="layers whose units stay, beside those the recipe leaves out: shell patterns"
    )
    criteria: tuple[Plugin, ...] = Field(
        ({"name": "mean_activation"}, {"name": "magnitude"}),
        description="what else units are ranked by, once, over all layers together; the lowest goes first",
    )
    random: int = Field(5, ge=0, description="orders drawn at random")
    points: int = Field(20, ge=2, description="numbers of dropped units that all are judged at, at most")
    seed: int = Field(0, ge=0, description="of the random orders")

    @model_validator(mode="after")
    def _consistent(self) -> OracleSpec:
        if self.steps is not None and self.until is not None:
            raise ValueError("steps and until both say when to stop: give one")
        if len({str(sorted(c.items(), key=str)) for c in self.criteria}) < len(self.criteria):
            raise ValueError("criteria repeat one")
        if not self.criteria and not self.random:
            raise ValueError("nothing to compare with: give criteria, or random above 0")
        return self
