"""Network slimming: an L1 penalty on the BatchNorm scales, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from secateur.errors import UsageError
from secateur.regularizers.base import Regularizer

if TYPE_CHECKING:
    from torch import nn

    from secateur.core.targets import Targets
    from secateur.regularizers.attachment import Attachment

__all__ = ["NetworkSlimming"]


@dataclass(frozen=True)
class NetworkSlimming(Regularizer):
    """Adds `l1` times the sum of |gamma| over all target BatchNorms to the loss; the channels of lowest |gamma| are
    pruned afterwards (criterion `bn_gamma`). Without the drop it is the control of DDROP, which calls it "Standard".

    Args:
        l1: factor of the penalty, at least 0. The subgradient at gamma = 0 is 0.

    Differs from the paper: the penalty is part of the loss rather than added to the gradient, which is the same for
    a plain optimizer and lets loss scaling and gradient clipping see it.

    Randomness: none. Cost: one sum over the scales each step.

    Reference: Liu et al. 2017, "Learning Efficient Convolutional Networks through Network Slimming", equation 1.
    """

    l1: float = 1e-4
    acts_on: ClassVar[Literal["weight", "norm"]] = "norm"
    draws_noise: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("unit",)
    state: ClassVar[str] = "none"
    summary: ClassVar[str] = "L1 on gamma, no noise (DDROP's control)"
    paper: ClassVar[str] = "Liu et al. 2017"
    cost: ClassVar[str] = "a sum over the BatchNorm scales each step"

    def __post_init__(self) -> None:
        if self.l1 < 0:
            raise UsageError(f"network_slimming: l1 is at least 0, got {self.l1}")

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.gamma_penalty import GammaPenalty

        return GammaPenalty(self, model, targets, seed)
