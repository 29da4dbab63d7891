"""No regularizer: plain training, the first control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.regularizers.base import Regularizer

if TYPE_CHECKING:
    from torch import nn

    from secateur.core.targets import Targets
    from secateur.regularizers.attachment import Attachment

__all__ = ["NoRegularizer"]


@dataclass(frozen=True)
class NoRegularizer(Regularizer):
    """Plain training. Pruned by magnitude afterwards, it is the control for every method."""

    draws_noise: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("weight", "unit")
    state: ClassVar[str] = "none"
    summary: ClassVar[str] = "plain training (control)"
    paper: ClassVar[str] = "control"
    cost: ClassVar[str] = "none"

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.attachment import Attachment

        return Attachment(self, model, targets, seed)
