"""Targeted Dropout: drop, while training, what a magnitude criterion would prune."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from secateur.core.schedule import targeted_dropout_ramp
from secateur.errors import UnknownNameError, UsageError
from secateur.regularizers.base import WeightNoise

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.core.duration import Progress
    from secateur.core.targets import Target
    from secateur.regularizers.stream import NoiseStream

__all__ = ["TargetedDropout"]


@dataclass(frozen=True)
class TargetedDropout(WeightNoise):
    """The `gamma` share of lowest-magnitude weights (of each unit) or units (of each layer) are candidates;
    each candidate is zeroed with probability `alpha`, afresh every step. Expected kept share: 1 - gamma alpha.

    Args:
        gamma: candidate share in [0, 1]; floor(gamma n) candidates of n.
        alpha: drop rate of a candidate in [0, 1].
        granularity: `"weight"`: the smallest |w| inside each unit's weights; `"unit"`: the units of smallest
            L2 norm inside each layer (attention: inside each head of query, key and value).
        ramp: raise gamma and alpha from 0 over the first two fifths of the run.
        draw: for granularity `"unit"`: one decision for a candidate unit (`"unit"`), or one for each weight inside
            it (`"weight"`, as the published code does).
        keep_per_unit: for granularity `"weight"`: all but this many weights of each unit are candidates, at least 0
            of them, whatever the unit's fan-in ("Xtreme" pruning); gamma is not used then.

    Differs from the paper: nothing is dropped in eval mode (the published code zeroes all candidates there),
    and a dropped unit is dropped as a whole (the published code draws per weight inside the unit: `draw="weight"`).
    No rescaling, as in the paper.

    Randomness: the attachment's own stream. Cost: one extra copy of the target weights and, for `"weight"` (draw or
        granularity), a bit a weight; where gradients accumulate, the gradient of one layer on top. Whole units of
        large layers take none where their outputs are fewer than their weights (`WeightSwap` says when). The ranking
        and the mask take time once a step, whatever the batch.

    Reference: Gomez et al. 2019, "Learning Sparse Networks Using Targeted Dropout", equations 3-4; section 5.4
        (ramp, Xtreme).
    """

    gamma: float = 0.75
    alpha: float = 0.66
    granularity: Literal["weight", "unit"] = "weight"
    ramp: bool = False
    draw: Literal["unit", "weight"] = "unit"
    keep_per_unit: int | None = None
    summary: ClassVar[str] = "drops the lowest-magnitude candidates at random"
    paper: ClassVar[str] = "Gomez et al. 2019"
    cost: ClassVar[str] = "a rank and a mask of the weights each step"

    def __post_init__(self) -> None:
        for name in ("gamma", "alpha"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"targeted_dropout: {name} is a share in [0, 1], got {getattr(self, name)}")
        if self.granularity not in ("weight", "unit"):
            raise UnknownNameError("targeted_dropout granularity", self.granularity, ["weight", "unit"])
        if self.draw not in ("unit", "weight"):
            raise UnknownNameError("targeted_dropout draw", self.draw, ["unit", "weight"])
        if self.keep_per_unit is not None and (self.granularity != "weight" or self.keep_per_unit < 0):
            raise UsageError(
                "targeted_dropout: keep_per_unit is a number of weights, at least 0, for granularity weight; got "
                f"{self.keep_per_unit} for granularity {self.granularity}"
            )

    def multiplier(self, target: Target, weight: Tensor, stream: NoiseStream, progress: Progress) -> Tensor | None:
        from secateur.regularizers.candidates import all_but_lowest

        by_gamma, by_alpha = targeted_dropout_ramp(progress.fraction) if self.ramp else (1.0, 1.0)
        gamma, alpha = self.gamma * by_gamma, self.alpha * by_alpha
        rows = target.rows(weight)
        if self.granularity == "weight":
            candidates = math.floor(gamma * target.fan_in + 1e-9)
            if self.keep_per_unit is not None:
                candidates = math.floor(by_gamma * max(0, target.fan_in - self.keep_per_unit) + 1e-9)
            if not candidates or not alpha:
                return None
            kept = all_but_lowest(rows, candidates).logical_or_(stream.bernoulli(tuple(rows.shape), 1.0 - alpha))
            return target.unrows(kept)
        per_block = target.units // target.blocks
        candidates = math.floor(gamma * per_block + 1e-9)
        if not candidates or not alpha:
            return None
        norms = rows.norm(dim=1).reshape(target.blocks, per_block)
        safe = all_but_lowest(norms, candidates)
        if self.draw == "weight":
            kept = stream.bernoulli(tuple(rows.shape), 1.0 - alpha).logical_or_(safe.reshape(-1, 1))
            return target.unrows(kept)
        kept = safe.logical_or_(stream.bernoulli(tuple(norms.shape), 1.0 - alpha))
        return target.spread(kept.reshape(-1))
