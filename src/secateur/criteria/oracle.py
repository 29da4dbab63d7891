"""The oracle: the loss without a unit, tried for every unit; or a greedy search's order of removal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.criteria.base import Criterion, Evidence, Need
from secateur.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Oracle"]


@dataclass(frozen=True)
class Oracle(Criterion):
    """Mean loss of the network with that one unit set to zero, nothing else changed; units only.

    A unit that the network is better without scores below a dead one. Greedy search, one unit at a time, is
    `secateur.variants.greedy.greedy_oracle`, whose `criterion()` is this one with `order` filled in; or
    `prune_in_rounds` with as many rounds as units.

    Args:
        order: (layer, unit) in the order of removal, as a greedy search has found it: the score is then the place in
            it, and units that are not in it score higher than all that are. Empty: every unit is tried alone.

    Cost: one forward pass over the data for every unit: for small networks and few batches only. No data with `order`.

    Differs from the paper: DropNet's oracle masks activations; here the unit's weights, its bias, and the scale and
    shift of a BatchNorm right behind it are zero, which is the same for activation functions that keep 0.

    Reference: Tan and Motani 2020 (DropNet), the oracle it is compared with.
    """

    order: tuple[tuple[str, int], ...] = ()

    needs: ClassVar[frozenset[Need]] = frozenset({"ablation_loss"})
    granularities: ClassVar[tuple[str, ...]] = ("unit",)
    informed: ClassVar[bool] = False
    summary: ClassVar[str] = "loss without the unit"
    paper: ClassVar[str] = "Tan and Motani 2020 (DropNet)"
    cost: ClassVar[str] = "one forward pass for every unit"

    def __post_init__(self) -> None:
        # From JSON they come as lists.
        object.__setattr__(self, "order", tuple((layer, unit) for layer, unit in self.order))
        if len(set(self.order)) < len(self.order):
            twice = next(unit for unit in self.order if self.order.count(unit) > 1)
            raise UsageError(f"oracle: order has unit {twice[1]} of {twice[0]} twice; expected every unit once")

    def wanted(self) -> frozenset[Need]:
        return frozenset() if self.order else self.needs

    def score(self, evidence: Evidence) -> Tensor:
        if not self.order:
            assert evidence.ablation_loss is not None
            return evidence.ablation_loss
        target = evidence.target
        names = {target.name, target.module, *target.aliases}
        # Half precision would count to 2048 only.
        score = evidence.weight.new_zeros(target.units).float().fill_(len(self.order))
        for place, (layer, unit) in enumerate(self.order):
            if layer in names:
                if not 0 <= unit < target.units:
                    raise UsageError(
                        f"oracle: order has unit {unit} of {layer}, which has 0 to {target.units - 1}; "
                        "the order is of another network"
                    )
                score[unit] = float(place)
        return score
