"""PGMPF: pruned units shrink after every epoch, and in between get ever less of their gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.errors import UsageError
from secateur.regularizers.base import Regularizer
from secateur.regularizers.soft_filter_pruning import asymptotic_share

if TYPE_CHECKING:
    from torch import nn

    from secateur.core.targets import Targets
    from secateur.regularizers.attachment import Attachment

__all__ = ["PGMPF"]


@dataclass(frozen=True)
class PGMPF(Regularizer):
    """After epoch e (from 0) of E the units of smallest L2 norm of each target are marked as pruned: the share of
    ASFP, sparsity x (1 - exp(-k e)) with k = 8 ln(4) / E, and `sparsity` itself from 0.9 E on. Two things follow.

    - Their weights and biases, and scale and shift of a BatchNorm that surely follows, are multiplied by
      mu_e = exp(-a e) with a = -ln(sigma / (1 + 0.01 sigma)) / E; by 0 from 0.8 E on.
    - In the next epoch the gradient of their weights is multiplied by (1 - lambda_e) b, where b is 0 or 1 with equal
      probability for each unit and step, and lambda_e = 1 - (1 - (e + 1) / E)^3; by 0 from `block_from` E on.

    Args:
        sparsity: share of units to prune, in [0, 1); at least one unit stays.
        sigma: what mu falls to over the run, in (0, 1); the authors take 1e-5 for a pretrained network.
        block_from: share of the epochs after which pruned units get no gradient, in [0, 1]; the authors take 0.8 for a
            pretrained network.

    `finalize()` zeroes the smallest units at `sparsity`, BatchNorm included, and returns the masks of the weights.
    Exclude the output layer, and the shortcut convolutions of a ResNet as the authors do.

    Differs from the paper: the BatchNorm is found by following the layer's output in the first forward pass, not by
    the names of one network's layers. All layer types are targets, not only convolutions.

    Randomness: the attachment's own stream, drawn once a step for all layers outside the graph. The same
    draw serves all backward passes of a step.
    Cost: one multiplication per target gradient each step; a norm of the weights each epoch.

    Reference: Cai et al. 2022, "Prior Gradient Mask Guided Pruning-Aware Fine-Tuning", with the schedules of its code.
    """

    sparsity: float = 0.5
    sigma: float = 1e-3
    block_from: float = 0.9
    noisy_outputs: ClassVar[bool] = False
    granularities: ClassVar[tuple[str, ...]] = ("unit",)
    state: ClassVar[str] = "noise stream, pruned units"
    summary: ClassVar[str] = "shrinks the smallest units after every epoch, masks their gradients"
    paper: ClassVar[str] = "Cai et al. 2022 (PGMPF)"
    cost: ClassVar[str] = "a mask of the gradients each step"

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise UsageError(f"pgmpf: sparsity is a share in [0, 1), got {self.sparsity}")
        if not 0.0 < self.sigma < 1.0:
            raise UsageError(f"pgmpf: sigma lies in (0, 1), got {self.sigma}")
        if not 0.0 <= self.block_from <= 1.0:
            raise UsageError(f"pgmpf: block_from is a share of the epochs in [0, 1], got {self.block_from}")

    def sparsity_at(self, epoch: int, epochs: int) -> float:
        """Share of units that is pruned after epoch `epoch` (from 0) of `epochs`."""
        return self.sparsity if 10 * epoch >= 9 * epochs else self.sparsity * asymptotic_share(epoch / epochs)

    def shrink_at(self, epoch: int, epochs: int) -> float:
        """mu: what pruned weights are multiplied by after epoch `epoch` (from 0)."""
        if 10 * epoch >= 8 * epochs:
            return 0.0
        # Base to the power, not exp(-a e): the same number.
        smallest: float = self.sigma / (1.0 + 0.01 * self.sigma)
        return float(smallest ** (epoch / epochs))

    def blocked_at(self, epoch: int, epochs: int) -> float:
        """lambda: the share of a pruned weight's gradient that is blocked once epoch `epoch` (from 0) is over.

        Examples:
            >>> PGMPF().blocked_at(49, 100)
            0.875
        """
        if epoch >= self.block_from * epochs - 1e-9:
            return 1.0
        return 1.0 - (1.0 - (epoch + 1) / epochs) ** 3

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.soft_pruning import ProgressivePruner

        return ProgressivePruner(self, model, targets, seed)
