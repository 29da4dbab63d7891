"""Soft filter pruning: zero the smallest filters after every epoch, and let them grow again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from secateur.errors import UnknownNameError, UsageError
from secateur.regularizers.base import Regularizer

if TYPE_CHECKING:
    from torch import nn

    from secateur.core.targets import Targets
    from secateur.regularizers.attachment import Attachment

__all__ = ["SoftFilterPruning", "asymptotic_share"]


@dataclass(frozen=True)
class SoftFilterPruning(Regularizer):
    """After every epoch, and at the end of the run, the floor(sparsity n) units of smallest L2 norm of each target
    (n units) are set to zero; gradients are not masked, so that they may grow again in the next epoch.

    Args:
        sparsity: share of units to zero at the end of the run, in [0, 1); at least one unit stays.
        schedule: `"constant"` (SFP): `sparsity` from the first epoch on; `"exponential"` (ASFP): sparsity x
            (1 - exp(-k e)) after e of E epochs, with k = 8 ln(4) / E.

    Zeroed are the weights of a unit: all outputs of a convolution or linear layer, for attention the rows of query,
    key and value, ranked inside each head. Ties: the lowest index goes first. Biases and BatchNorms are left alone.
    `finalize()` zeroes once more, at `sparsity`, and returns the masks. Exclude the output layer.

    Differs from the paper: its code prunes convolutions only; the last pruning of ASFP takes `sparsity` itself,
    which the exponential misses by 0.002 %.

    Randomness: none. Cost: one read of the weights an epoch.

    Reference: He et al. 2018, "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks"; He et al.
    2018, "Asymptotic Soft Filter Pruning for Deep Convolutional Neural Networks" (`"exponential"`).
    """

    sparsity: float = 0.5
    schedule: Literal["constant", "exponential"] = "constant"
    draws_noise: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("unit",)
    state: ClassVar[str] = "progress"
    summary: ClassVar[str] = "zeroes the smallest units after every epoch, lets them regrow"
    paper: ClassVar[str] = "He et al. 2018 (SFP, ASFP)"
    cost: ClassVar[str] = "a norm of the weights each epoch"

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise UsageError(f"soft_filter_pruning: sparsity is a share in [0, 1), got {self.sparsity}")
        if self.schedule not in ("constant", "exponential"):
            raise UnknownNameError("soft_filter_pruning schedule", self.schedule, ["constant", "exponential"])

    def sparsity_at(self, t: float) -> float:
        """Share of units that is zeroed when the fraction `t` of the run is done.

        Examples:
            >>> SoftFilterPruning(0.5, "exponential").sparsity_at(0.125)
            0.375
        """
        if self.schedule == "constant" or t >= 1.0:
            return self.sparsity
        return self.sparsity * asymptotic_share(t)

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.soft_pruning import SoftPruner

        return SoftPruner(self, model, targets, seed)


def asymptotic_share(t: float) -> float:
    """ASFP's share of the final sparsity, 1 - exp(-8 ln(4) t), when the fraction `t` of the epochs is done.

    Examples:
        >>> [asymptotic_share(t) for t in (0.0, 0.0625, 0.125, 0.25)]
        [0.0, 0.5, 0.75, 0.9375]
    """
    return 1.0 - 4.0 ** (-8.0 * t)
