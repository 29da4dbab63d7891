"""Wanda: |w| times the norm of what it multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.criteria.base import Criterion, Evidence, Need

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Wanda"]


@dataclass(frozen=True)
class Wanda(Criterion):
    """|w| * ||x||, the L2 norm of its input over all samples and positions; a unit scores the sum of its weights'.

    Compare inside each unit's weights, as the paper does: scope `"column"`. For a convolution x is an input channel as
    one kernel position sees it, padding included.

    Cost: one forward pass over the data; float64 scores.

    Differs from the paper: that prunes linear layers one after the other, each on the inputs that the pruned layers
    before it give; here all inputs are those of the network as it is. Convolutions are an extension.

    Reference: Sun et al. 2024, equation 1.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"weights", "input_norm"})
    summary: ClassVar[str] = "|w| x L2 norm of its input"
    paper: ClassVar[str] = "Sun et al. 2024"
    cost: ClassVar[str] = "one forward pass"

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.input_norm is not None
        return evidence.weight.abs() * evidence.input_norm
