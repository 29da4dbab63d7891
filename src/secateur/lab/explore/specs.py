"""The sections of an exploration, as a recipe writes them. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from secateur.lab.train_spec import Plugin, Sparsity, Spec

__all__ = [
    "DeliverSpec",
    "JudgeSpec",
    "NoiseSpec",
    "PointSpec",
    "SearchSectionSpec",
    "SectionSpec",
    "WeightsSpec",
    "check_time",
    "seconds",
]

Sigma = Annotated[float, Field(ge=0.0)]
_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """A time with its unit, in seconds.

    Examples:
        >>> seconds("10min"), seconds("1.5h")
        (600.0, 5400.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", text)
    if match is None or not float(match[1]):
        raise ValueError(f'time "{text}": expected a number above 0 and s, min or h, as in 10min')
    return float(match[1]) * _UNITS[match[2]]


def check_time(text: str) -> str:
    """The text, if it is a time."""
    seconds(text)
    return text


class WeightsSpec(Spec):
    """Weights trained elsewhere, and how that training saw its images."""

    file: str = Field(description=".safetensors or torch.save, in the working or the data folder; no code in it is run")
    mean: tuple[float, ...] | None = Field(
        None,
        description="subtracted from pixels in [0, 1], a number a channel; default: as secateur does for the data set",
    )
    std: tuple[Annotated[float, Field(gt=0.0)], ...] | None = Field(None, description="divided by afterwards")

    @model_validator(mode="after")
    def _both(self) -> WeightsSpec:
        if (self.mean is None) != (self.std is None) or (self.mean and self.std and len(self.mean) != len(self.std)):
            raise ValueError("mean and std go together, a number a channel each")
        return self


class JudgeSpec(Spec):
    """Which images variants are judged by; no choice is made by any other, and the report measures on the rest."""

    images: int | None = Field(None, ge=2, description="how many, classes in proportion; default: half, 1000 at most")
    source: Literal["test", "validation"] = Field(
        "test", description="validation: the share data.validation holds out, which then must not have been trained on"
    )
    skip: int = Field(
        0, ge=0, description="first set so many aside, by which another exploration has judged; they are not held back"
    )
    recalibrate: int | None = Field(
        None, ge=1, description="give every variant BatchNorm statistics of so many training images"
    )
    batch_size: int | None = Field(
        None, ge=1, description="images at a time; default: about as many as fit a processor's cache, or 500 on a GPU"
    )


class SectionSpec(Spec):
    """One section of an exploration."""

    title: str | None = Field(None, description="its heading in the report")


class NoiseSpec(SectionSpec):
    """Stochastic pruning: populations of networks pruned with noise, beside the network pruned without."""

    kind: Literal["noise"]
    criterion: Plugin = Field({"name": "magnitude"}, description="what weights are ranked by")
    scope: Literal["tensor", "global"] = Field("global", description="rank all weights together, or each layer's own")
    sigmas: tuple[Sigma, ...] = Field(min_length=1, description="deviations of the noise; 0 is always there")
    sparsities: tuple[Sparsity, ...] = Field(min_length=1, description="fractions of weights to remove")
    variants: int = Field(20, ge=1, description="networks a cell, each with noise of its own seed")
    first_seed: int = Field(0, ge=0, description="of the noise of the first network of a cell")
    transfer: bool = Field(False, description="also exchange masks between noisy and plain network")
    crossover: int = Field(0, ge=0, le=20, description="halvings of the step in which noise of a sigma begins to pay")
    confirm: bool = Field(
        True, description="measure the cell of the largest gain again: images held back, noise of fresh seeds"
    )

    @model_validator(mode="after")
    def _distinct(self) -> NoiseSpec:
        for name in ("sigmas", "sparsities"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} repeat a value")
        if not any(self.sigmas):
            raise ValueError("sigmas hold only 0, the plain network; give one above 0")
        return self


class PointSpec(SectionSpec):
    """What a network of a search is made of."""

    vary: Literal["weights", "units"] = Field("weights", description="noise and zeros among weights, or units cut")
    criterion: Plugin = Field({"name": "magnitude"}, description="what is ranked by")
    variants: int = Field(5, ge=1, description="weights: networks with noise of their own, whose mean counts")


class DeliverSpec(PointSpec):
    """One network by its numbers: made, saved, reloaded, measured on the images held back."""

    kind: Literal["deliver"]
    numbers: dict[str, float] = Field(description="weights: sigma, sparsity; units: a sparsity for each group")

    @model_validator(mode="after")
    def _possible(self) -> DeliverSpec:
        if self.vary == "weights" and set(self.numbers) != {"sigma", "sparsity"}:
            raise ValueError(f"numbers: expected sigma and sparsity, got {', '.join(self.numbers) or 'none'}")
        for name, value in self.numbers.items():
            if value < 0.0 or (name != "sigma" and value >= 1.0):
                expected = "at least 0" if name == "sigma" else "a sparsity in [0, 1)"
                raise ValueError(f"numbers: {name}: got {value:g}, expected {expected}")
        return self


class SearchSectionSpec(PointSpec):
    """Search for the networks that no other beats, through Optuna; one of them is delivered.

    `vary: weights` searches noise and sparsity of single weights; `vary: units` the share of units that each
    dependency group loses.
    """

    kind: Literal["search"]
    objectives: tuple[Literal["accuracy", "sparsity", "gain", "latency", "bytes"], ...] = Field(
        ("accuracy", "sparsity"), description="gain: of noise, times sparsity; latency: of the dense network's"
    )
    sampler: Literal["grid", "random", "nsga2", "tpe"] = Field("nsga2", description="how numbers are proposed")
    population: int = Field(50, ge=2, description="nsga2: trials a generation")
    trials: int | None = Field(None, ge=1, description="how many; default: ten generations, or what the budget allows")
    budget: Annotated[str, AfterValidator(check_time)] | None = Field(None, description="stop after this time: 10min")
    sigma: tuple[Sigma, Sigma] = Field((1e-4, 1e-2), description="weights: searched between these")
    sparsity: tuple[Sparsity, Sparsity] = Field((0.01, 0.99), description="searched between these")
    storage: str | None = Field(None, description="a SQLite file, a journal (.jsonl) or a server's URL, to share")
    study: str = Field("search", min_length=1, description="its name in the storage, which may hold several")
    seed: int = Field(0, ge=0, description="of the search")
    tolerance: float = Field(0.01, ge=0.0, le=1.0, description="deliver the smallest that loses no more accuracy")

    @model_validator(mode="after")
    def _consistent(self) -> SearchSectionSpec:
        if len(set(self.objectives)) < len(self.objectives) or len(self.objectives) < 2:
            raise ValueError(f"objectives: expected at least two, all different, got {', '.join(self.objectives)}")
        if "accuracy" not in self.objectives:
            raise ValueError("objectives must have accuracy among them: nothing else keeps the network useful")
        wrong = {"gain"} if self.vary == "units" else {"latency"}
        if found := wrong & set(self.objectives):
            why = "noise is not searched" if self.vary == "units" else "zeros among weights make no network faster"
            raise ValueError(f"objective {found.pop()} does not go with vary {self.vary}: {why}")
        for name in ("sigma", "sparsity"):
            low, high = getattr(self, name)
            if not low < high:
                raise ValueError(f"{name}: expected the lower end first, got [{low:g}, {high:g}]")
        return self
