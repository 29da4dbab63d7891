"""Mean |activation|, DropNet's metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from secateur.criteria.base import Criterion, Evidence, Need
from secateur.errors import UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MeanActivation"]


@dataclass(frozen=True)
class MeanActivation(Criterion):
    """E|a|: mean over samples and positions of the absolute post-activation; units only.

    Args:
        order: which end of the ranking is removed first: `"minimum"`, the units that fire least, or `"maximum"`, those
            that fire most.

    Differs from the paper's code: that averages over positions before taking the absolute value, which is the
    same after a ReLU and differs for signed maps.

    Cost: one forward pass over the data, O(units) memory.

    Reference: Tan and Motani 2020 (DropNet), section 3.
    """

    order: Literal["minimum", "maximum"] = "minimum"
    needs: ClassVar[frozenset[Need]] = frozenset({"mean_abs"})
    granularities: ClassVar[tuple[str, ...]] = ("unit",)
    summary: ClassVar[str] = "mean |activation| over the data"
    paper: ClassVar[str] = "Tan and Motani 2020 (DropNet)"
    cost: ClassVar[str] = "one forward pass"

    def __post_init__(self) -> None:
        if self.order not in ("minimum", "maximum"):
            raise UnknownNameError("order of mean_activation", self.order, ["minimum", "maximum"])

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.mean_abs is not None
        return evidence.mean_abs if self.order == "minimum" else -evidence.mean_abs
