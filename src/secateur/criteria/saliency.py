"""First-order Taylor score of weights: |gradient x weight|."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.criteria.base import Criterion, Evidence, Need

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Saliency"]


@dataclass(frozen=True)
class Saliency(Criterion):
    """|g * w| with the mean gradient g over the data; a unit scores the sum over its weights.

    Cost: one forward and backward pass over the data, one extra copy of the target weights.

    Reference: Mozer and Smolensky 1989; LeCun et al. 1990, first-order term.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"weights", "gradients"})
    summary: ClassVar[str] = "|gradient x weight|"
    paper: ClassVar[str] = "Mozer and Smolensky 1989"
    cost: ClassVar[str] = "one forward and backward pass"

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.gradient is not None
        return (evidence.gradient * evidence.weight).abs()
