"""Variational dropout: a learned noise level for every weight; weights that drown in noise are pruned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.errors import UsageError
from secateur.regularizers.base import Regularizer

if TYPE_CHECKING:
    from torch import nn

    from secateur.core.targets import Targets
    from secateur.regularizers.attachment import Attachment

__all__ = ["VariationalDropout"]


@dataclass(frozen=True)
class VariationalDropout(Regularizer):
    """Every weight w has Gaussian noise of learned variance sigma^2. Training adds to each output the noise it
    causes there, of variance layer(x^2; exp(log_alpha) w^2), where log_alpha = ln(sigma^2 / w^2) within [-8, 8]; a
    penalty, the KL divergence from a log-uniform prior, favors noise. In eval mode there is no noise, and weights
    with log_alpha at or above the threshold are zero.

    Args:
        factor: what the sum of all divergences is multiplied by in the loss, at least 0 (the variational bound: one
            over the number of training samples).
        warmup: share of the run, in [0, 1], over which the penalty rises linearly from 0 to its factor.
        threshold: of log_alpha, in (-8, 8]; 3 is a dropout rate of 0.95.
        log_sigma2_init: what ln(sigma^2) starts from, in [-20, 2].

    Differs from the paper: `scores` are -log_alpha without the limits, so that the ends do not tie.

    Randomness: the attachment's own stream gives one seed a target and step, outside the graph; an operator makes
    the noise from it, in compiled graphs too. A layer called twice in one forward pass sees the same noise twice.
    Cost: a second forward and backward pass of the layers and a normal number per output (on the CPU one of 65,536
        quantiles); one copy of the weights until the backward pass.

    Reference: Molchanov, Ashukha, Vetrov 2017, "Variational Dropout Sparsifies Deep Neural Networks", equation 14
    (divergence) and section 4 (sigma^2 learned in place of alpha, noise on outputs).
    """

    factor: float = 2e-5
    warmup: float = 0.0
    threshold: float = 3.0
    log_sigma2_init: float = -10.0
    learns: ClassVar[bool] = True
    granularities: ClassVar[tuple[str, ...]] = ("weight",)
    state: ClassVar[str] = "log_sigma2 of each weight, noise stream"
    summary: ClassVar[str] = "learned noise on each weight; what drowns in noise is zero"
    paper: ClassVar[str] = "Molchanov et al. 2017"
    cost: ClassVar[str] = "a second pass of the layers, a normal number per output"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 0):
            raise UsageError(f"variational_dropout: factor is at least 0, got {self.factor}")
        if not 0.0 <= self.warmup <= 1.0:
            raise UsageError(f"variational_dropout: warmup is a share of the run in [0, 1], got {self.warmup}")
        if not -8.0 < self.threshold <= 8.0:
            raise UsageError(f"variational_dropout: threshold lies in (-8, 8], got {self.threshold}")
        if not -20.0 <= self.log_sigma2_init <= 2.0:
            raise UsageError(f"variational_dropout: log_sigma2_init lies in [-20, 2], got {self.log_sigma2_init}")

    def attach(self, model: nn.Module, targets: Targets | None = None, *, seed: int = 0) -> Attachment:
        from secateur.regularizers.variational import VariationalNoise

        return VariationalNoise(self, model, targets, seed)
