"""|gamma| of the BatchNorm that follows a unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.criteria.base import Criterion, Evidence, Need

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BnGamma"]


@dataclass(frozen=True)
class BnGamma(Criterion):
    """|gamma| of the BatchNorm that follows the layer; units only.

    Cost: one forward pass over one batch, to see which BatchNorm follows which layer.

    Reference: Liu et al. 2017 (network slimming); DDROP, section III.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"norm"})
    granularities: ClassVar[tuple[str, ...]] = ("unit",)
    absolute: ClassVar[bool] = True
    summary: ClassVar[str] = "|gamma| of the following BatchNorm"
    paper: ClassVar[str] = "Liu et al. 2017; DDROP"
    cost: ClassVar[str] = "one batch"

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.norm_scale is not None
        return evidence.norm_scale
