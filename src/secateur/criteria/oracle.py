"""The oracle: the loss without a unit, tried for every unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.criteria.base import Criterion, Evidence, Need

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Oracle"]


@dataclass(frozen=True)
class Oracle(Criterion):
    """Mean loss of the network with that one unit set to zero, nothing else changed; units only.

    A unit that the network is better without scores below a dead one. Greedy search, one unit at a time, is
    `prune_in_rounds` with as many rounds as units.

    Cost: one forward pass over the data for every unit: for small networks and few batches only.

    Differs from the paper: DropNet's oracle masks activations; here the unit's weights, its bias, and the scale and
    shift of a BatchNorm right behind it are zero, which is the same for activation functions that keep 0.

    Reference: Tan and Motani 2020 (DropNet), the oracle it is compared with.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"ablation_loss"})
    granularities: ClassVar[tuple[str, ...]] = ("unit",)
    informed: ClassVar[bool] = False
    summary: ClassVar[str] = "loss without the unit"
    paper: ClassVar[str] = "Tan and Motani 2020 (DropNet)"
    cost: ClassVar[str] = "one forward pass for every unit"

    def score(self, evidence: Evidence) -> Tensor:
        assert evidence.ablation_loss is not None
        return evidence.ablation_loss
