"""Plain dropout of weights or units: the papers' untargeted control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from secateur.errors import UnknownNameError, UsageError
from secateur.regularizers.base import WeightNoise

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.core.duration import Progress
    from secateur.core.targets import Target
    from secateur.regularizers.stream import NoiseStream
    from secateur.regularizers.targeted_dropout import TargetedDropout

__all__ = ["Dropout"]


@dataclass(frozen=True)
class Dropout(WeightNoise):
    """Every weight (dropconnect) or unit is zeroed with probability `drop_rate`; the kept ones are scaled by
    1 / (1 - drop_rate). It knows nothing of importance: the control that Targeted Dropout has to beat.

    Args:
        drop_rate: probability of dropping, in [0, 1). `Dropout.matched(targeted)` sets it to gamma x alpha.
        granularity: `"weight"` or `"unit"`.

    Randomness: the attachment's own stream. Cost: as Targeted Dropout without the ranking.

    Reference: Srivastava et al. 2014; Wan et al. 2013 (dropconnect); Gomez et al. 2019, section 5 (control).
    """

    drop_rate: float = 0.5
    granularity: Literal["weight", "unit"] = "weight"
    summary: ClassVar[str] = "untargeted dropout of weights or units (control)"
    paper: ClassVar[str] = "Srivastava et al. 2014; Wan et al. 2013"
    cost: ClassVar[str] = "a mask of the weights each step"

    def __post_init__(self) -> None:
        if not 0.0 <= self.drop_rate < 1.0:
            raise UsageError(f"dropout: drop_rate lies in [0, 1), got {self.drop_rate}")
        if self.granularity not in ("weight", "unit"):
            raise UnknownNameError("dropout granularity", self.granularity, ["weight", "unit"])

    @classmethod
    def matched(cls, targeted: TargetedDropout) -> Dropout:
        """The control with the same expected drop as `targeted`: drop_rate = gamma x alpha, same granularity.

        Raises: `UsageError` for `keep_per_unit`, whose gamma is another in each layer.
        """
        if targeted.keep_per_unit is not None:
            raise UsageError(
                f"dropout: keep_per_unit={targeted.keep_per_unit} drops another share in each layer, which no one "
                "drop_rate matches; give one regularizer with drop_rate = alpha (1 - k / fan_in) to each layer"
            )
        return cls(drop_rate=targeted.gamma * targeted.alpha, granularity=targeted.granularity)

    def multiplier(
        self, target: Target, weight: Tensor, stream: NoiseStream, progress: Progress
    ) -> tuple[Tensor, float] | None:
        if not self.drop_rate:
            return None
        scale = 1.0 / (1.0 - self.drop_rate)
        if self.granularity == "weight":
            keep = stream.bernoulli((target.units, target.fan_in), 1.0 - self.drop_rate)
            return target.unrows(keep), scale
        keep = stream.bernoulli((target.units,), 1.0 - self.drop_rate)
        return target.spread(keep), scale
