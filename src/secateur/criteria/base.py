"""The contract of a criterion, and the evidence it may ask for. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.core.targets import Target

__all__ = ["Criterion", "Evidence", "Need"]

Need = Literal[
    "weights",
    "gradients",
    "norm",
    "mean_abs",
    "variance",
    "zero_fraction",
    "activation_gradients",
    "zero_map_fraction",
    "input_norm",
    "hessian_gradient",
    "synaptic_flow",
    "ablation_loss",
    "learned",
]


@dataclass(frozen=True)
class Evidence:
    """What is known about one target when it is scored; fields a criterion did not ask for are None.

    Args:
        target: name, kind and shape; `target.rows(x)` gives the `[units, fan_in]` view.
        weight: the parameter, detached, in its own shape.
        seed: root seed for criteria that draw numbers.
        gradient: mean gradient of the loss over all samples, shaped like `weight`. Need: `"gradients"`.
        norm_scale: `[units]`, gamma of the BatchNorm that follows. Need: `"norm"`.
        mean_abs: `[units]`, mean over samples and positions of |activation|, after BatchNorm and
            activation function where the unit feeds them alone. Need: `"mean_abs"`.
        variance: `[units]`, unbiased variance of the same. Need: `"variance"`.
        zero_fraction: `[units]`, share of samples and positions where it is exactly 0. Need: `"zero_fraction"`.
        activation_gradient: `[units]`, mean over samples of |mean over positions of gradient x activation|.
            Need: `"activation_gradients"`.
        zero_map_fraction: `[units]`, share of samples whose map has a mean of exactly 0. Need: `"zero_map_fraction"`.
        input_norm: shaped like `weight` (a view that repeats one value for all units that share an input): L2 norm,
            over all samples and positions, of the input that each weight multiplies. Need: `"input_norm"`.
        hessian_gradient: shaped like `weight`, H g: Hessian of the mean loss times its gradient, both over all
            target weights and with the outputs divided by `Criterion.temperature`. Need: `"hessian_gradient"`.
        synaptic_flow: shaped like `weight`, |w dR/dw|, R the summed output of the network with every parameter and
            BatchNorm statistic made absolute, for an input of ones. Need: `"synaptic_flow"`.
        ablation_loss: `[units]`, mean loss with that one unit set to zero. Need: `"ablation_loss"`.
        learned: `[units]` or shaped like `weight`, the score that a regularizer has learned. Need: `"learned"`.
    """

    target: Target
    weight: Tensor
    seed: int = 0
    gradient: Tensor | None = None
    norm_scale: Tensor | None = None
    mean_abs: Tensor | None = None
    variance: Tensor | None = None
    zero_fraction: Tensor | None = None
    activation_gradient: Tensor | None = None
    zero_map_fraction: Tensor | None = None
    input_norm: Tensor | None = None
    hessian_gradient: Tensor | None = None
    synaptic_flow: Tensor | None = None
    ablation_loss: Tensor | None = None
    learned: Tensor | None = None


class Criterion(ABC):
    """An importance score. Subclasses are frozen dataclasses that state what they need and write `score`.

    Class attributes:
        needs: what `Evidence` must hold; the driver gathers the union for all criteria together. Where settings decide,
            name everything here and narrow it in `wanted`.
        granularities: `"weight"` if it scores single weights (it then serves units and blocks too, pooled),
            `"unit"` if it can give one number per unit.
        absolute: the score is the absolute value of what `score` returns (saves a copy of the weights).
        tail_share: the score is w^2 over the sum of squares of all weights of the target that rank no lower, by |w| and
            where equal by index. Single weights are then selected without computing scores.
        informed: a dead unit (weights, bias and gamma zero) ranks last; False for controls that ignore the network
            and for scores that say something else by definition.
        temperature: what the network's outputs are divided by for `"hessian_gradient"`.
        pool: how weight scores add up to a unit's: `"sum"`, `"mean"`, `"l1"` or `"l2"`.
        summary, paper, cost: for tables and cards.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})
    granularities: ClassVar[tuple[str, ...]] = ("weight", "unit")
    absolute: ClassVar[bool] = False
    tail_share: ClassVar[bool] = False
    informed: ClassVar[bool] = True
    temperature: float = 1.0
    pool: str = "sum"
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    cost: ClassVar[str] = "no data"

    @abstractmethod
    def score(self, evidence: Evidence) -> Tensor:
        """Importance, higher = keep: shaped like `evidence.weight`, or `[units]`."""

    def wanted(self) -> frozenset[Need]:
        """What this instance needs: `needs`, or the part of it that its settings call for."""
        return self.needs

    def jointly(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scores of all targets, seen together at last: the place to normalize by a total over layers."""
        return scores
