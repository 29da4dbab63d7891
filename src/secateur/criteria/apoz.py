"""APoZ: how seldom a unit is exactly zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.criteria.base import Criterion, Evidence, Need

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["APoZ"]


@dataclass(frozen=True)
class APoZ(Criterion):
    """1 - share of zeros among a unit's activations over samples and positions; units only.

    Args:
        per_map: count samples whose map averages to exactly 0 instead of single zeros, as DropNet's code does. For
            layers without positions that is the same.

    Cost: one forward pass over the data, O(units) memory.

    Differs from the paper: Hu et al. prune units above a threshold of APoZ; here exactly the asked number goes.

    Reference: Hu et al. 2016, equation 1.
    """

    per_map: bool = False
    needs: ClassVar[frozenset[Need]] = frozenset({"zero_fraction", "zero_map_fraction"})
    granularities: ClassVar[tuple[str, ...]] = ("unit",)
    summary: ClassVar[str] = "1 - share of zero activations"
    paper: ClassVar[str] = "Hu et al. 2016"
    cost: ClassVar[str] = "one forward pass"

    def wanted(self) -> frozenset[Need]:
        return frozenset({"zero_map_fraction" if self.per_map else "zero_fraction"})

    def score(self, evidence: Evidence) -> Tensor:
        zeros = evidence.zero_map_fraction if self.per_map else evidence.zero_fraction
        assert zeros is not None
        return 1.0 - zeros
