"""Random scores: the control every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.criteria.base import Criterion, Evidence

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Random"]


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform scores in [0, 1).

    Randomness: drawn on the CPU from a generator keyed by (seed, target name), so masks are the same on
    every device and machine.
    """

    pool = "mean"
    informed: ClassVar[bool] = False
    summary: ClassVar[str] = "uniform random scores (control)"
    paper: ClassVar[str] = "control"

    def score(self, evidence: Evidence) -> Tensor:
        from secateur.core.seeds import keyed_generator

        generator = keyed_generator(evidence.seed, "random criterion", evidence.target.name)
        return evidence.weight.new_empty(evidence.weight.shape, device="cpu").uniform_(generator=generator)
