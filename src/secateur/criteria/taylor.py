"""First-order Taylor score of units: how much the loss would change if the unit's map were zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.criteria.base import Criterion, Evidence, Need

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Taylor"]


@dataclass(frozen=True)
class Taylor(Criterion):
    """|mean over positions of dC/dh * h| of each map, averaged over samples; units only.

    Args:
        normalize: divide by the layer's L2 norm, so that layers can be compared (scope `"global"`).

    Cost: one forward and backward pass over the data.

    Reference: Molchanov et al. 2017, equations 7-8.
    """

    normalize: bool = True
    needs: ClassVar[frozenset[Need]] = frozenset({"activation_gradients"})
    granularities: ClassVar[tuple[str, ...]] = ("unit",)
    summary: ClassVar[str] = "|gradient x activation| of each map"
    paper: ClassVar[str] = "Molchanov et al. 2017"
    cost: ClassVar[str] = "one forward and backward pass"

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.activation_gradient is not None
        score = evidence.activation_gradient
        return score / score.norm().clamp_min(1e-30) if self.normalize else score
