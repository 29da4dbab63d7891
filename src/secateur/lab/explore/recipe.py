"""Recipes that explore one network, and the kinds of sections they may have. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from secateur.lab.explore.analyses_spec import AnalysesSpec
from secateur.lab.explore.fine_tune_spec import FineTuneSpec
from secateur.lab.explore.masks_spec import MasksSpec
from secateur.lab.explore.oracle_spec import OracleSpec
from secateur.lab.explore.sensitivity_spec import SensitivitySpec
from secateur.lab.explore.specs import DeliverSpec, JudgeSpec, NoiseSpec, SearchSectionSpec, WeightsSpec
from secateur.lab.recipe import MethodSpec, Recipe, canonical_hash
from secateur.lab.train_spec import DataSpec, ModelSpec, Plugin, Spec, TrainSpec

__all__ = ["ExploreRecipe", "Section"]

Section = Annotated[
    AnalysesSpec
    | DeliverSpec
    | FineTuneSpec
    | MasksSpec
    | NoiseSpec
    | OracleSpec
    | SearchSectionSpec
    | SensitivitySpec,
    Field(discriminator="kind"),
]

# What the layers of a preset leave out: stochastic pruning's own code spares the first convolution and the classifier.
_PRESETS = {"sp_paper": ("@first", "@last")}


class ExploreRecipe(Spec):
    """One network, its own or trained by others, and what is asked about its variants."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)
    description: str = ""
    data: DataSpec = DataSpec()
    model: ModelSpec = ModelSpec()
    weights: WeightsSpec | None = Field(None, description="weights trained elsewhere; default: trained here")
    train: TrainSpec = TrainSpec()
    regularizer: Plugin = Field({"name": "none"}, description="what to train under, with its parameters")
    train_exclude: tuple[str, ...] = Field((), description="layers that the regularizer leaves alone in training")
    seed: int = Field(0, ge=0, description="of the network's training")
    include: tuple[str, ...] = Field(("*",), description="layers that variants change: shell patterns, @first, @last")
    exclude: tuple[str, ...] = Field((), description="layers they leave alone")
    preset: Literal["sp_paper"] | None = Field(None, description="sp_paper: leave out the first and the last layer")
    judge: JudgeSpec = JudgeSpec()
    explore: tuple[Section, ...] = Field(min_length=1, description="what to do, in order")

    @model_validator(mode="after")
    def _consistent(self) -> ExploreRecipe:
        if self.preset is not None and self.exclude:
            raise ValueError(f"preset {self.preset} says which layers are left out: give it or exclude, not both")
        if self.weights is not None:
            for name in ("train", "regularizer", "train_exclude"):
                if self._changed(name):
                    raise ValueError(f"{name} trains a network, and weights are given: leave one of them out")
        if self.judge.source == "validation" and not self.data.validation:
            raise ValueError("judge.source validation needs a share held out: set data.validation (0.1)")
        titles = [section.title or section.kind for section in self.explore]
        if len(set(titles)) < len(titles):
            twice = next(t for t in titles if titles.count(t) > 1)
            raise ValueError(f'two sections are called "{twice}": give each a title of its own')
        kept = [(s.storage, s.study) for s in self.explore if s.kind == "search" and s.storage is not None]
        if len(set(kept)) < len(kept):
            raise ValueError("two searches keep their trials in one study: give one another name (study)")
        return self

    @property
    def excluded(self) -> tuple[str, ...]:
        """The layers left alone, those of the preset among them."""
        return self.exclude if self.preset is None else _PRESETS[self.preset]

    def base(self) -> Recipe:
        """The recipe that trains the network, if it is trained here."""
        return Recipe(
            name=self.name,
            seeds=(self.seed,),
            data=self.data,
            model=self.model,
            train=self.train,
            methods=(MethodSpec(label="network", regularizer=self.regularizer, exclude=self.train_exclude),),
        )

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults filled in, as plain JSON data."""
        return self.model_dump(mode="json")

    @property
    def hash(self) -> str:
        """Eight hex digits that change when anything that affects the numbers does."""
        return canonical_hash({k: v for k, v in self.resolved().items() if k not in ("name", "description")})[:8]
