"""L0: gates that are exactly zero with a learned probability, and a penalty on how many are not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from secateur.errors import UnknownNameError, UsageError
from secateur.regularizers.base import Regularizer

if TYPE_CHECKING:
    from torch import nn

    from secateur.core.targets import Targets
    from secateur.regularizers.attachment import Attachment

__all__ = ["L0"]


@dataclass(frozen=True)
class L0(Regularizer):
    """Every unit or weight is multiplied by a hard-concrete gate z = clip(1.2 s - 0.1, 0, 1), where
    s = sigmoid((ln u - ln(1 - u) + log_alpha) / (2/3)) with u uniform and log_alpha learned; in eval mode
    s = sigmoid(log_alpha). The penalty is the expected number of weights whose gate is not zero.

    Args:
        factor: what the expected number of weights behind open gates is multiplied by in the loss, at least 0
            (the paper's lambda over the number of training samples).
        granularity: `"unit"`: one gate for each output of a layer, its bias included; `"weight"`: one each weight.
        drop_rate_init: d in (0, 1); log_alpha starts from a normal distribution of mean ln((1 - d) / d) and
            deviation 0.01.

    Gates and expected count are exact; log_alpha is kept within ln 100 of 0. Biases do not count.

    Differs from the paper: Linear layers are gated by output unit (the published code gates their inputs), one set
    of gates is drawn for the whole batch, and the prior on biases, which the published code rewards, is left out.

    Randomness: the attachment's own stream gives one seed a target and step, outside the graph.
    Cost: one multiplication per regularized weight, and one copy of them until the backward pass; `"unit"`: per output
        where these are fewer. `"weight"`: noise is made twice, except in layers of at most 65,536 weights, which hold
        it and what the gates are made of.

    Reference: Louizos, Welling, Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization",
    equations 10-13.
    """

    factor: float = 2e-6
    granularity: Literal["unit", "weight"] = "unit"
    drop_rate_init: float = 0.3
    learns: ClassVar[bool] = True
    granularities: ClassVar[tuple[str, ...]] = ("weight", "unit")
    state: ClassVar[str] = "log_alpha of each gate, noise stream"
    summary: ClassVar[str] = "learned hard-concrete gates, a penalty on their expected number"
    paper: ClassVar[str] = "Louizos et al. 2018"
    cost: ClassVar[str] = "a product per weight, in the graph"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 0):
            raise UsageError(f"l0: factor is at least 0, got {self.factor}")
        if self.granularity not in ("unit", "weight"):
            raise UnknownNameError("l0 granularity", self.granularity, ["unit", "weight"])
        if not 0.0 < self.drop_rate_init < 1.0:
            raise UsageError(f"l0: drop_rate_init lies in (0, 1), got {self.drop_rate_init}")

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.gates import HardConcreteGates

        return HardConcreteGates(self, model, targets, seed)
