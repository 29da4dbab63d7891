"""GraSP: how much the gradient's norm would shrink without a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.criteria.base import Criterion, Evidence, Need
from secateur.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Grasp"]


@dataclass(frozen=True)
class Grasp(Criterion):
    """w * Hg: weights go first whose removal preserves the gradient flow best; a unit scores the sum of its weights'.

    To first order, removing w changes half the squared gradient norm by -w * Hg, which the paper calls S; it removes
    the largest S. Scores are signed: a weight of 0 scores 0, in the middle. Meant for an untrained network and scope
    `"global"`.

    Args:
        temperature: outputs are divided by this before the loss; above 0.

    Cost: two forward passes, a backward pass and a double backward pass over the data; two extra copies of the target
    weights. The batches are read twice.

    Differs from the paper: that takes ten samples of each class; here all data given count. BatchNorm uses its running
    statistics, which the paper leaves open. Exactly the asked number goes; the published code removes one fewer.

    Reference: Wang et al. 2020, equation 8 and algorithm 1.
    """

    temperature: float = 200.0
    needs: ClassVar[frozenset[Need]] = frozenset({"weights", "hessian_gradient"})
    informed: ClassVar[bool] = False
    summary: ClassVar[str] = "weight x (Hessian x gradient): keeps gradient flow"
    paper: ClassVar[str] = "Wang et al. 2020"
    cost: ClassVar[str] = "two forward passes, one backward, one double backward"

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature < math.inf:
            raise UsageError(f"grasp: temperature is above 0 and finite, got {self.temperature}")

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.hessian_gradient is not None
        return evidence.weight * evidence.hessian_gradient
