"""What a section that fine-tunes pruned networks may say. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from secateur.lab.explore.specs import SectionSpec
from secateur.lab.train_spec import OptimizerSpec, Plugin, TrainSpec

__all__ = ["FineTuneSpec"]

_TRAIN = TrainSpec(duration="5ep", batch_size=128, optimizer=OptimizerSpec(lr=0.01))


class FineTuneSpec(SectionSpec):
    """Fine-tune networks pruned with noise, beside the network pruned without; what is removed stays at zero.

    All are trained on the same batches in the same order, by default on the training set for five epochs: SGD, momentum
    0.9, weight decay 5e-4, batches of 128, learning rate from 0.01 to 0 along a cosine over the whole training.
    """

    kind: Literal["fine_tune"]
    criterion: Plugin = Field({"name": "magnitude"}, description="what weights are ranked by")
    scope: Literal["tensor", "global"] = Field("global", description="rank all weights together, or each layer's own")
    sigma: float = Field(gt=0.0, description="deviation of the noise; the network without noise is always there")
    sparsity: float = Field(gt=0.0, lt=1.0, description="fraction of weights to remove")
    variants: int = Field(5, ge=1, description="noisy networks, with noise of seeds 0, 1, ...")
    choose: Literal["all", "best"] = Field(
        "all", description="best: fine-tune only the noisy network that is best on the images judged by, pruned"
    )
    train: TrainSpec = Field(_TRAIN, description="how to fine-tune")
    paper: bool = Field(
        False, description="sp_paper_ft: fine-tune as the code released with stochastic pruning does, not as above"
    )
    images: int = Field(5000, ge=2, description="paper only: how many training images, drawn at random, to train on")
    epochs: int = Field(100, ge=1, description="paper only: passes over them, and steps of half a wave of the rate")

    @model_validator(mode="after")
    def _one_way(self) -> FineTuneSpec:
        if self.paper and self._changed("train"):
            raise ValueError("paper says how to train: leave train out")
        if not self.paper and self._changed("images", "epochs"):
            raise ValueError("images and epochs belong to paper: true; else say train.duration and data.subset")
        return self
