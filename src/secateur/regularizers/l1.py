"""An L1 penalty on the weights: the oldest way to make them small enough to prune."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from secateur.errors import UnknownNameError, UsageError
from secateur.regularizers.base import Regularizer

if TYPE_CHECKING:
    from torch import nn

    from secateur.core.targets import Targets
    from secateur.regularizers.attachment import Attachment

__all__ = ["L1"]


@dataclass(frozen=True)
class L1(Regularizer):
    """Adds factor times the sum of |w| over all targets to the loss.

    Args:
        factor: weight of the penalty, at least 0.
        reduction: `"sum"`: the sum of |w| over all targets, as in the paper; `"mean_per_tensor"`: the sum over the
            target tensors of their mean |w|, as in its code, where every layer counts alike whatever its size.

    The gradient is factor times the sign of w, 0 at w = 0. Biases and norms are not targets; weight decay is
    another term, and stays.

    Randomness: none. Cost: one read of the weights for the value and one for the gradient each step.

    Reference: Gomez et al. 2019, section 5 (baseline "L1").
    """

    factor: float = 1e-4
    reduction: Literal["sum", "mean_per_tensor"] = "sum"
    draws_noise: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("weight", "unit")
    state: ClassVar[str] = "none"
    summary: ClassVar[str] = "an L1 penalty on the weights"
    paper: ClassVar[str] = "Han et al. 2015; Gomez et al. 2019"
    cost: ClassVar[str] = "a norm of the weights each step"

    def __post_init__(self) -> None:
        if not 0.0 <= self.factor < math.inf:
            raise UsageError(f"l1: factor is at least 0 and finite, got {self.factor}")
        if self.reduction not in ("sum", "mean_per_tensor"):
            raise UnknownNameError("l1 reduction", self.reduction, ["sum", "mean_per_tensor"])

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.penalties import L1Penalty

        return L1Penalty(self, model, targets, seed)
