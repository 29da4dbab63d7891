"""Magnitude: |w| for weights, the L1 or L2 norm for units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.criteria.base import Criterion, Evidence
from secateur.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude(Criterion):
    """|w|; a unit or block scores the norm of its weights.

    Args:
        order: 1 or 2, the norm for units and blocks. Single weights rank the same under both.

    Cost: no data, one read of the weights.

    Reference: Han et al. 2015; L2 of filters as in Targeted Dropout, section 4.
    """

    order: int = 2
    absolute: ClassVar[bool] = True
    summary: ClassVar[str] = "|w|; L1 or L2 norm of a unit"
    paper: ClassVar[str] = "Han et al. 2015; Li et al. 2017"

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise UsageError(f"magnitude: order is 1 or 2, got {self.order}")

    @property
    def pool(self) -> str:  # type: ignore[override]
        return f"l{self.order}"

    def score(self, evidence: Evidence) -> Tensor:
        return evidence.weight
