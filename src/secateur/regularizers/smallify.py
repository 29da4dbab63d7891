"""Smallify: L1 on learned gates; a gate whose sign begins to change is closed for good."""

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

__all__ = ["Smallify"]


@dataclass(frozen=True)
class Smallify(Regularizer):
    """Every unit or weight is multiplied by a learned gate under an L1 penalty. After each step the moving mean m
    and variance v of the gate's sign s are updated, v <- decay v + (1 - decay) (s - m)^2 with the old m; once v
    exceeds the threshold, the gate is zero for good.

    Args:
        factor: what the sum of |gate| is multiplied by in the loss, at least 0.
        granularity: `"unit"`: one gate for each output of a layer, its bias included; `"weight"`: one each weight.
        decay: of the moving mean and variance, in [0, 1). At 0.9 two steps of the other sign close a gate; the
            authors' code uses 0.99.
        threshold: of the variance, in (0, 1].

    Differs from the authors' code: gates act on the layer's output, not in a layer of their own, and are folded into
    the weights at the end.

    Randomness: gates start uniform in (0, 1], from the seed and the target's name; nothing is drawn later.
    Cost: one multiplication per regularized weight, and one copy of them until the backward pass; `"unit"`: per output
        where these are fewer.

    Reference: Leclerc et al. 2018, "Smallify: Learning Network Size while Training".
    """

    factor: float = 1e-4
    granularity: Literal["unit", "weight"] = "unit"
    decay: float = 0.9
    threshold: float = 0.5
    draws_noise: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    granularities: ClassVar[tuple[str, ...]] = ("weight", "unit")
    state: ClassVar[str] = "each gate, mean and variance of its sign, whether it is closed"
    summary: ClassVar[str] = "L1 on learned gates, closed for good when their sign changes"
    paper: ClassVar[str] = "Leclerc et al. 2018"
    cost: ClassVar[str] = "a product per weight, in the graph"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 0):
            raise UsageError(f"smallify: factor is at least 0, got {self.factor}")
        if self.granularity not in ("unit", "weight"):
            raise UnknownNameError("smallify granularity", self.granularity, ["unit", "weight"])
        if not 0.0 <= self.decay < 1.0:
            raise UsageError(f"smallify: decay lies in [0, 1), got {self.decay}")
        if not 0.0 < self.threshold <= 1.0:
            raise UsageError(f"smallify: threshold lies in (0, 1], got {self.threshold}")

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.gates import SignGates

        return SignGates(self, model, targets, seed)
