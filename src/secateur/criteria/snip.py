"""SNIP: connection sensitivity |gradient x weight|, as a share of the whole network's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.criteria.base import Criterion, Evidence, Need

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Snip"]


@dataclass(frozen=True)
class Snip(Criterion):
    """|g * w| over its sum over all targets; a unit scores the sum over its weights.

    g is the mean gradient over all data given. The order is that of `saliency`; the scores of all targets sum to 1.
    Meant for an untrained network and scope `"global"`.

    Cost: one forward and backward pass over the data, one extra copy of the target weights.

    Differs from the paper: that takes one mini-batch at initialization; here the caller decides on network and data.

    Reference: Lee et al. 2019, equations 5-6.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"weights", "gradients"})
    summary: ClassVar[str] = "|gradient x weight| as a share of the network's"
    paper: ClassVar[str] = "Lee et al. 2019"
    cost: ClassVar[str] = "one forward and backward pass"

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.gradient is not None
        return (evidence.gradient * evidence.weight).abs()

    def jointly(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        total = sum(float(s.double().sum()) for s in scores.values())
        return {name: score / total for name, score in scores.items()} if total else scores
