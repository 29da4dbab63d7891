"""What a recipe says about looking into a network and its pruned variants. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from secateur.lab.explore.specs import SectionSpec
from secateur.lab.train_spec import Plugin, Sparsity

__all__ = ["AnalysesSpec", "What"]

What = Literal[
    "feature_variance",
    "gradient_flow",
    "weight_cdf",
    "mask_overlap",
    "collapse",
    "hessian",
    "spread",
    "mc_dropout",
    "weight_dependence",
]
Sigma = Annotated[float, Field(ge=0.0)]


class AnalysesSpec(SectionSpec):
    """What pruning, with and without noise, does to the inside of the network."""

    kind: Literal["analyses"]
    what: tuple[What, ...] = Field(
        ("feature_variance", "gradient_flow", "weight_cdf", "mask_overlap", "collapse", "hessian", "spread"),
        min_length=1,
        description="what to look at, in this order",
    )
    criterion: Plugin = Field({"name": "magnitude"}, description="what weights are ranked by")
    scope: Literal["tensor", "global"] = Field("global", description="rank all weights together, or each layer's own")
    sparsities: tuple[Sparsity, ...] = Field((0.5, 0.9), min_length=1, description="fractions of weights to remove")
    sigmas: tuple[Sigma, ...] = Field((0.0,), min_length=1, description="deviations of the noise; 0: no noise")
    variants: int = Field(5, ge=1, description="networks for each sigma above 0, with noise of its own each")
    images: int = Field(512, ge=2, description="training images for variances, gradients and second derivatives")
    thin: float = Field(0.01, ge=0.0, le=1.0, description="collapse: name layers that keep less than this share")
    passes: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (2, 5, 10, 20, 50), min_length=1, description="mc_dropout: noisy predictions to average"
    )
    drop_rate: float = Field(
        0.1, gt=0.0, lt=1.0, description="mc_dropout: share of units that masks drop, in a network without dropout"
    )
    seed: int = Field(0, ge=0, description="mc_dropout: of the noise; the first of the masks")
    paired: tuple[str, ...] = Field(
        (), description="weight_dependence: layers whose weights are paired; default: all, or pairs of layers if many"
    )

    @model_validator(mode="after")
    def _consistent(self) -> AnalysesSpec:
        for name in ("what", "sparsities", "sigmas", "passes"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"{name} repeat a value")
        if self.paired and "weight_dependence" not in self.what:
            raise ValueError("paired is for weight_dependence: name that in what too")
        noisy = any(self.sigmas)
        if "mask_overlap" in self.what and "what" in self.model_fields_set:
            if not noisy:
                raise ValueError("mask_overlap compares masks of several noises: give a sigma above 0")
            if self.variants < 2:
                raise ValueError("mask_overlap compares masks of several noises: variants must be 2 or more")
        return self
