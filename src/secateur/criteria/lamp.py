"""LAMP: squared magnitude over the squared magnitudes that are at least as large in its layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.criteria.base import Criterion, Evidence

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Lamp"]


@dataclass(frozen=True)
class Lamp(Criterion):
    """w^2 over the sum of v^2 of all weights v of the layer that rank no lower; a unit scores the sum of its weights'.

    Inside a layer the order is that of |w|; the score lets scope `"global"` share the sparsity out between layers. The
    largest weight of every layer scores 1, so that no layer is emptied.

    Among equal |w| the lowest index ranks lowest. A layer of zeros scores 0. Sums are taken in float64.

    Cost: no data. Scores take a sort of each layer, in float64; masks of single weights are found without them, in two
    reads of the weights.

    Differs from the paper: its formula gives equal |w| equal scores, its code whatever the sort leaves; here the order
    is fixed. The authors remove a fifth of what remains, fine-tune, and score again; this is the score.

    Reference: Lee et al. 2021, the definition of the LAMP score in section 2.
    """

    tail_share: ClassVar[bool] = True
    summary: ClassVar[str] = "w^2 over the sum of all larger w^2 in the layer"
    paper: ClassVar[str] = "Lee et al. 2021"
    cost: ClassVar[str] = "no data, one sort of each layer"

    def score(self, evidence: Evidence) -> Tensor:
        magnitude, order = evidence.weight.abs().flatten().sort(stable=True)
        squares = magnitude.double().square()
        at_least = squares.flip(0).cumsum(0).flip(0)
        # A weight whose square underflows is a zero.
        ratio = squares / at_least.clamp_min(1e-300)
        return squares.new_empty(squares.shape).scatter_(0, order, ratio).reshape(evidence.weight.shape)
