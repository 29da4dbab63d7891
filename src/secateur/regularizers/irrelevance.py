"""Irrelevance regularization: weight decay for the weights that the loss does not react to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.errors import UsageError
from secateur.regularizers.base import Regularizer

if TYPE_CHECKING:
    from torch import nn

    from secateur.core.targets import Targets
    from secateur.regularizers.attachment import Attachment

__all__ = ["Irrelevance"]


@dataclass(frozen=True)
class Irrelevance(Regularizer):
    """The objective is the loss L plus factor times the sum of exp(-|dL/dw|) w^2 over all targets, where the
    exponential counts as a constant: weights with a small loss gradient are pulled to zero.

    `penalty()` has the value 0, because dL/dw is known in the backward pass only; there the term's gradient
    2 factor exp(-|dL/dw|) w is added, in every backward pass that `penalty()` is part of. Add it to the loss as
    it is: what multiplies the whole (loss scaling, 1/n of gradient accumulation) is told from the loss's own gradient.

    Args:
        factor: weight of the term (lambda), at least 0.

    dL/dw is the gradient of one backward pass: of a batch or, with gradient accumulation, of each part of it.

    Randomness: none. Cost: an exponential of every target weight each backward pass, one extra copy of the gradients.

    Reference: irrelevance regularization as equations 10-11 of the thesis "Dropout for NN Pruning".
    """

    factor: float = 1e-4
    draws_noise: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("weight", "unit")
    state: ClassVar[str] = "none"
    summary: ClassVar[str] = "weight decay, the stronger the smaller the loss gradient"
    paper: ClassVar[str] = "thesis, equations 10-11"
    cost: ClassVar[str] = "an exponential of the gradients each step"

    def __post_init__(self) -> None:
        if not 0.0 <= self.factor < math.inf:
            raise UsageError(f"irrelevance: factor is at least 0 and finite, got {self.factor}")

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.penalties import IrrelevanceTerm

        return IrrelevanceTerm(self, model, targets, seed)
