"""DDROP: dropout of channels whose keep probability follows the rank of their BatchNorm scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from secateur.core.schedule import keep_prob_at
from secateur.errors import UsageError
from secateur.regularizers.base import Regularizer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secateur.core.targets import Targets
    from secateur.regularizers.attachment import Attachment

__all__ = ["DDrop", "keep_probabilities"]


@dataclass(frozen=True)
class DDrop(Regularizer):
    """Channel i of a BatchNorm with n channels is kept with probability
    keep_min + (keep_max - keep_min) rank_i / (n - 1), where rank_i counts the other channels whose |gamma| is
    not larger; dropped channels are zeroed after the BatchNorm, before the activation function.

    Args:
        keep_min, keep_max: keep probabilities of the lowest and highest rank, 0 <= keep_min <= keep_max <= 1
            (the paper calls them p_min and p_max and "dropout probabilities").
        schedule: `"constant"`, or `"linear"` / `"cosine"` from 1 at the start to the bounds at the end;
            changes once an epoch.
        l1: factor of the L1 penalty on gamma, separate from weight decay.
        per_sample: an independent mask for every sample; otherwise one per batch.
        rescale: divide kept channels by their keep probability.

    Differs from the paper's code, which binds no forward (no dropout happens) and ranks by a single argsort.
    Ties share the highest rank, so equal gammas (a fresh network) keep everything with keep_max.

    Randomness: the attachment's own stream, drawn once a step for all layers outside the graph.
    Cost: one multiplication per activation of the regularized BatchNorms.

    Reference: DDROP, section III, algorithm 1 (with n - 1 for n).
    """

    keep_min: float = 0.6
    keep_max: float = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    l1: float = 1e-3
    per_sample: bool = True
    rescale: bool = False
    acts_on: ClassVar[Literal["weight", "norm"]] = "norm"
    granularities: ClassVar[tuple[str, ...]] = ("unit",)
    summary: ClassVar[str] = "drops channels by the rank of |gamma|, L1 on gamma"
    paper: ClassVar[str] = "DDROP"
    cost: ClassVar[str] = "a mask of the BatchNorm outputs each step"

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep_min <= self.keep_max <= 1.0:
            raise UsageError(
                f"ddrop: expected 0 <= keep_min <= keep_max <= 1, got keep_min={self.keep_min}, "
                f"keep_max={self.keep_max}"
            )
        if self.l1 < 0:
            raise UsageError(f"ddrop: l1 is at least 0, got {self.l1}")
        keep_prob_at(1.0, self.schedule, 0.0)

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.channel_noise import RankedChannelDropout

        return RankedChannelDropout(self, model, targets, seed)


def keep_probabilities(scores: Tensor, keep_min: float, keep_max: float) -> Tensor:
    """Keep probability of each unit from the rank of its score, `[n] -> [n]`.

    rank_i = number of other units whose score is not larger (ties share the highest rank).

    Examples:
        >>> import torch
        >>> keep_probabilities(torch.tensor([0.5, 0.1, 0.3, 0.3, 0.9]), 0.6, 1.0)
        tensor([0.9000, 0.6000, 0.8000, 0.8000, 1.0000])
    """
    import torch

    if scores.numel() < 2:
        return torch.full_like(scores, keep_max)
    ordered = scores.sort().values
    rank = torch.searchsorted(ordered, scores, right=True) - 1
    return keep_min + (keep_max - keep_min) * rank.to(scores.dtype) / (scores.numel() - 1)
