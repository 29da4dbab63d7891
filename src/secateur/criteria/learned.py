"""What a regularizer has learned about every weight or unit, as the score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.criteria.base import Criterion, Evidence, Need

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Learned"]


@dataclass(frozen=True)
class Learned(Criterion):
    """The scores that a regularizer kept while training (`attachment.scores()`), unchanged.

    Pass them as `learned=` to `rank`, `rank_units` or `score_targets`; a recipe does so by itself. One score per unit
    serves granularity `"unit"` only; one per weight serves all, a unit scoring the mean over its weights.

    Cost: no data.
    """

    pool = "mean"
    needs: ClassVar[frozenset[Need]] = frozenset({"learned"})
    summary: ClassVar[str] = "what the regularizer has learned"
    paper: ClassVar[str] = "that of the regularizer"

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.learned is not None
        return evidence.learned
