"""Schedules as pure functions of the fraction of a run that is done, t in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from secateur.errors import UnknownNameError, UsageError

__all__ = ["RAMPS", "Gradual", "Iterative", "OneShot", "Schedule", "keep_prob_at", "targeted_dropout_ramp"]


def _cosine(t: float) -> float:
    return 0.5 * (1.0 - math.cos(math.pi * t))


def _cubic(t: float) -> float:
    return 1.0 - (1.0 - t) ** 3


# From 0 at t = 0 to 1 at t = 1.
RAMPS: dict[str, Callable[[float], float]] = {"linear": lambda t: t, "cosine": _cosine, "cubic": _cubic}


def targeted_dropout_ramp(t: float) -> tuple[float, float]:
    """Multipliers of (gamma, alpha) in Targeted Dropout's ramp (Gomez et al. 2019, section 5.4).

    gamma rises linearly to 95 % of its target in the first fifth of the run and to 100 % in the second;
    alpha rises linearly over both.

    Examples:
        >>> [targeted_dropout_ramp(t) for t in (0.0, 0.2, 0.4, 1.0)]
        [(0.0, 0.0), (0.95, 0.5), (1.0, 1.0), (1.0, 1.0)]
    """
    gamma = 0.95 * t / 0.2 if t <= 0.2 else 0.95 + 0.05 * (t - 0.2) / 0.2
    return min(1.0, gamma), min(1.0, t / 0.4)


def keep_prob_at(keep_prob: float, schedule: Literal["constant", "linear", "cosine"], t: float) -> float:
    """DDROP's schedule of a keep probability: 1 (all kept) at t = 0, `keep_prob` at t = 1.

    linear `p + (1-p)(1-t)`, cosine `p + (1-p) cos(pi t / 2)`, constant `p`.

    Examples:
        >>> keep_prob_at(0.6, "linear", 0.5)
        0.8
    """
    if schedule == "constant":
        return keep_prob
    if schedule == "linear":
        return keep_prob + (1.0 - keep_prob) * (1.0 - t)
    if schedule == "cosine":
        return keep_prob + (1.0 - keep_prob) * math.cos(math.pi * t / 2.0)
    raise UnknownNameError("keep-probability schedule", schedule, ["constant", "linear", "cosine"])


def _check_sparsity(sparsity: float) -> None:
    if not 0.0 <= sparsity < 1.0:
        raise UsageError(f"sparsity is the fraction removed and lies in [0, 1), got {sparsity}")


@dataclass(frozen=True)
class OneShot:
    """Everything at once."""

    sparsity: float

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)

    def levels(self) -> tuple[float, ...]:
        return (self.sparsity,)


@dataclass(frozen=True)
class Iterative:
    """Remove `fraction` of what remains, again and again, until `sparsity` is reached exactly.

    Examples:
        >>> [round(s, 3) for s in Iterative(sparsity=0.5, fraction=0.2).levels()]
        [0.2, 0.36, 0.488, 0.5]
    """

    sparsity: float
    fraction: float = 0.2

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        if not 0.0 < self.fraction < 1.0:
            raise UsageError(f"fraction of what remains lies in (0, 1), got {self.fraction}")

    def levels(self) -> tuple[float, ...]:
        levels, density = [], 1.0
        while (density := density * (1.0 - self.fraction)) > 1.0 - self.sparsity + 1e-12:
            levels.append(1.0 - density)
        return (*levels, self.sparsity)


@dataclass(frozen=True)
class Gradual:
    """Raise the sparsity from `initial` to `sparsity` in `steps` levels along a ramp.

    `"cubic"` is Zhu and Gupta's schedule, s_f + (s_i - s_f)(1 - t)^3.

    Examples:
        >>> [round(s, 3) for s in Gradual(sparsity=0.8, steps=4, ramp="cubic").levels()]
        [0.463, 0.7, 0.788, 0.8]
    """

    sparsity: float
    steps: int = 10
    ramp: str = "cubic"
    initial: float = 0.0

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        _check_sparsity(self.initial)
        if self.ramp not in RAMPS:
            raise UnknownNameError("ramp", self.ramp, RAMPS)
        if self.steps < 1:
            raise UsageError(f"a gradual schedule needs at least 1 step, got {self.steps}")

    def levels(self) -> tuple[float, ...]:
        span = self.sparsity - self.initial
        inner = [self.initial + span * RAMPS[self.ramp](i / self.steps) for i in range(1, self.steps)]
        return (*inner, self.sparsity)


Schedule = OneShot | Iterative | Gradual
