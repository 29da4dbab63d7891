"""DDROP: dropout of channels whose keep probability follows the rank of their BatchNorm scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from secateur.core.schedule import keep_prob_at
from secateur.errors import UnknownNameError, UsageError
from secateur.regularizers.base import Regularizer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secateur.core.targets import Targets
    from secateur.regularizers.attachment import Attachment

__all__ = ["DDrop", "check_bounds", "keep_probabilities"]

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class DDrop(Regularizer):
    """Channel i of a BatchNorm with n channels is kept with probability
    keep_min + (keep_max - keep_min) rank_i / (n - 1), where rank_i counts the other channels whose |gamma| is
    not larger; dropped channels are zeroed after the BatchNorm, before the activation function.
    Layers without BatchNorm are ranked by the squared L2 norm of each unit's weights (`scores="weight_norm"`), or
    by a scale that is added to them (`DDropScale`).

    Args:
        keep_min, keep_max: keep probabilities of the lowest and highest rank, 0 <= keep_min <= keep_max <= 1
            (the paper calls them p_min and p_max and "dropout probabilities").
        schedule: `"constant"`, or `"linear"` / `"cosine"` from 1 at the start to the bounds at the end;
            changes once an epoch.
        l1: factor of the L1 penalty on gamma, separate from weight decay; 0 for `"weight_norm"`.
        per_sample: an independent mask for every sample; otherwise one per batch.
        rescale: divide kept channels by their keep probability.
        scores: what is ranked: `"gamma"`, |gamma| of BatchNorms; `"weight_norm"`, the squared L2 norm of each unit's
            weights, for linear and convolution layers: their output is masked, behind a BatchNorm if one follows.

    Differs from the paper's code, which binds no forward (no dropout happens) and ranks by a single argsort.
    Ties share the highest rank, so equal gammas (a fresh network) keep everything with keep_max.

    Randomness: the attachment's own stream, drawn once a step for all layers outside the graph.
    Cost: one multiplication per activation of the regularized layers, and one of its gradient unless ReLUs alone read
        it; `"weight_norm"`: a forward pass at the start, which finds out where a BatchNorm follows.

    Reference: DDROP, section III, algorithm 1 (with n - 1 for n).
    """

    keep_min: float = 0.6
    keep_max: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    l1: float = 1e-3
    per_sample: bool = True
    rescale: bool = False
    scores: Literal["gamma", "weight_norm"] = "gamma"
    acts_on: ClassVar[Literal["weight", "norm"]] = "norm"
    granularities: ClassVar[tuple[str, ...]] = ("unit",)
    summary: ClassVar[str] = "drops channels by the rank of |gamma|, L1 on gamma"
    paper: ClassVar[str] = "DDROP"
    cost: ClassVar[str] = "a mask of the BatchNorm outputs each step"

    def __post_init__(self) -> None:
        check_bounds("ddrop", self.keep_min, self.keep_max, self.schedule, self.l1)
        if self.scores not in ("gamma", "weight_norm"):
            raise UnknownNameError("ddrop scores", self.scores, ["gamma", "weight_norm"], "for a scale: ddrop_scale")
        if self.scores == "weight_norm":
            if self.l1:
                raise UsageError(f'ddrop: scores="weight_norm" knows no gamma to penalize, got l1={self.l1}; set l1=0')
            # What it acts on follows from what is ranked; everything else reads it from the instance.
            object.__setattr__(self, "acts_on", "weight")

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.channel_noise import RankedChannelDropout

        return RankedChannelDropout(self, model, targets, seed)


def check_bounds(method: str, keep_min: float, keep_max: float, schedule: Schedule, l1: float) -> None:
    """Raise `UsageError` unless these are bounds, a schedule and a penalty that DDROP can work with."""
    if not 0.0 <= keep_min <= keep_max <= 1.0:
        raise UsageError(
            f"{method}: expected 0 <= keep_min <= keep_max <= 1, got keep_min={keep_min}, keep_max={keep_max}"
        )
    if l1 < 0:
        raise UsageError(f"{method}: l1 is at least 0, got {l1}")
    keep_prob_at(1.0, schedule, 0.0)


def keep_probabilities(scores: Tensor, keep_min: float, keep_max: float) -> Tensor:
    """Keep probability of each unit from the rank of its score in its layer, `[..., n] -> [..., n]`.

    rank_i = number of other units whose score is not larger (ties share the highest rank).

    Examples:
        >>> import torch
        >>> keep_probabilities(torch.tensor([0.5, 0.1, 0.3, 0.3, 0.9]), 0.6, 1.0)
        tensor([0.9000, 0.6000, 0.8000, 0.8000, 1.0000])
    """
    import torch

    units = scores.shape[-1]
    if units < 2:
        return torch.full_like(scores, keep_max)
    ordered = scores.sort(dim=-1).values
    rank = torch.searchsorted(ordered, scores.contiguous(), right=True) - 1
    return keep_min + (keep_max - keep_min) * rank.to(scores.dtype) / (units - 1)
