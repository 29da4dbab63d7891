"""Gradual magnitude pruning: remove more and more weights while the network trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from secateur.core.schedule import RAMPS
from secateur.errors import UnknownNameError, UsageError
from secateur.regularizers.base import Regularizer

if TYPE_CHECKING:
    from torch import nn

    from secateur.core.targets import Targets
    from secateur.regularizers.attachment import Attachment

__all__ = ["GradualPruning"]


@dataclass(frozen=True)
class GradualPruning(Regularizer):
    """Between two points of the run the sparsity rises in equal intervals of time along a ramp; at each, the weights
    (or units) of smallest magnitude are zeroed, and stay zero to the end.

    With the cubic ramp the sparsity after a share t of the time between is s + (s_0 - s)(1 - t)^3.

    Args:
        sparsity: fraction removed in the end, in [0, 1).
        initial: fraction removed at `start`, in [0, sparsity].
        ramp: `"linear"`, `"cosine"` or `"cubic"`.
        start, end: shares of the run between which the sparsity rises, 0 <= start < end <= 1.
        updates: how many times, at least 1.
        granularity: `"weight"`, or `"unit"` (L2 norm of the unit's weights).
        scope: rank inside each `"tensor"`, or all together (`"global"`).

    Randomness: none. Cost: a selection over the targets at each update, a masked write each step, a byte a weight.

    Reference: Zhu and Gupta 2017, "To prune, or not to prune", equation 1.
    """

    sparsity: float = 0.9
    initial: float = 0.0
    ramp: str = "cubic"
    start: float = 0.0
    end: float = 0.75
    updates: int = 20
    granularity: Literal["weight", "unit"] = "weight"
    scope: Literal["tensor", "global"] = "tensor"
    draws_noise: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("weight", "unit")
    state: ClassVar[str] = "masks"
    summary: ClassVar[str] = "zeroes more and more of the smallest weights"
    paper: ClassVar[str] = "Zhu and Gupta 2017"
    cost: ClassVar[str] = "a selection at each update, a masked write each step"

    def __post_init__(self) -> None:
        if not 0.0 <= self.initial <= self.sparsity < 1.0:
            raise UsageError(
                f"gradual_pruning: expected 0 <= initial <= sparsity < 1, got initial={self.initial}, "
                f"sparsity={self.sparsity}"
            )
        if self.ramp not in RAMPS:
            raise UnknownNameError("ramp", self.ramp, RAMPS)
        if not 0.0 <= self.start < self.end <= 1.0:
            raise UsageError(
                f"gradual_pruning: expected 0 <= start < end <= 1 (shares of the run), got {self.start}, {self.end}"
            )
        if self.updates < 1:
            raise UsageError(f"gradual_pruning: updates is at least 1, got {self.updates}")
        for name, value, known in (
            ("granularity", self.granularity, ["weight", "unit"]),
            ("scope", self.scope, ["tensor", "global"]),
        ):
            if value not in known:
                raise UnknownNameError(f"gradual_pruning {name}", value, known)

    def sparsity_at(self, t: float) -> float:
        """Fraction removed when the share `t` of the run is done; rises in steps.

        Examples:
            >>> gradual = GradualPruning(0.8, start=0.0, end=0.8, updates=4)
            >>> [round(gradual.sparsity_at(t), 4) for t in (0.0, 0.19, 0.2, 0.4, 0.8, 1.0)]
            [0.0, 0.0, 0.4625, 0.7, 0.8, 0.8]
        """
        if t < self.start:
            return 0.0
        # 1e-9: a step that falls on an update up to rounding has reached it.
        done = int(min(1.0, (t - self.start) / (self.end - self.start)) * self.updates + 1e-9)
        return self.initial + (self.sparsity - self.initial) * RAMPS[self.ramp](done / self.updates)

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.gradual_pruner import GradualPruner

        return GradualPruner(self, model, targets, seed)
