"""DDROP for layers without BatchNorm: a learnable scale is added for it to rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from secateur.regularizers.base import Regularizer
from secateur.regularizers.ddrop import check_bounds

if TYPE_CHECKING:
    from torch import nn

    from secateur.core.targets import Targets
    from secateur.regularizers.attachment import Attachment

__all__ = ["DDropScale"]


@dataclass(frozen=True)
class DDropScale(Regularizer):
    """Every unit of the target layers gets a learnable factor, 1 at first, and is kept with probability
    keep_min + (keep_max - keep_min) rank_i / (n - 1) by the rank of the factor's magnitude among the n of its layer.

    Meant for the first linear layer of the MLPs of transformers: choose it by `include` or `targets`. The factors
    multiply the layer's output, behind a BatchNorm if one follows, in eval mode too. `finalize` folds them into the
    weights and biases.

    Args:
        keep_min, keep_max: keep probabilities of the lowest and highest rank, 0 <= keep_min <= keep_max <= 1.
        schedule: `"constant"`, or `"linear"` / `"cosine"` from 1 at the start to the bounds at the end;
            changes once an epoch.
        l1: factor of the L1 penalty on the scales, separate from weight decay.
        per_sample: an independent mask for every sample (all positions of a sequence share it); otherwise one per
            batch. A sample is an entry of dimension 0 of the layer's output.
        rescale: divide kept units by their keep probability.

    Differs from the paper's code, which ranks the signed scale while training and its magnitude when pruning; here
    it is the magnitude both times.

    Randomness: the attachment's own stream, drawn once a step for all layers outside the graph.
    Cost: one parameter a unit, one multiplication per activation of the layers; a forward pass at the start, which
        finds out where a BatchNorm follows.

    Reference: DDROP, section III ("DummyNorm").
    """

    keep_min: float = 0.6
    keep_max: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    l1: float = 1e-3
    per_sample: bool = True
    rescale: bool = False
    learns: ClassVar[bool] = True
    granularities: ClassVar[tuple[str, ...]] = ("unit",)
    state: ClassVar[str] = "noise stream, one scale a unit"
    summary: ClassVar[str] = "drops units by the rank of a scale it adds, L1 on it"
    paper: ClassVar[str] = "DDROP"
    cost: ClassVar[str] = "a scale and a mask of the layer outputs each step"

    def __post_init__(self) -> None:
        check_bounds("ddrop_scale", self.keep_min, self.keep_max, self.schedule, self.l1)

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.channel_noise import ScaledChannelDropout

        return ScaledChannelDropout(self, model, targets, seed)
