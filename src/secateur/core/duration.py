"""Durations that always carry a unit: `"30ep"`, `"500it"`, `"0.4run"`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from secateur.errors import UsageError

__all__ = ["Duration", "Progress"]

_FORM = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(ep|it|run)\s*$")


@dataclass(frozen=True)
class Duration:
    """A length of training.

    Args:
        value: how many, at least 0.
        unit: `"ep"` epochs, `"it"` optimizer steps, `"run"` fraction of the whole run in [0, 1].

    Examples:
        >>> Duration.parse("1.5ep").steps(steps_per_epoch=10)
        15
        >>> str(Duration.parse("0.40run"))
        '0.4run'
    """

    value: float
    unit: Literal["ep", "it", "run"]

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Read `"30ep"`, `"500it"` or `"0.4run"`; a bare number is refused because it has no unit."""
        match = _FORM.match(str(text))
        if match is None:
            raise UsageError(f'duration "{text}": expected a number with a unit, like 30ep, 500it or 0.4run')
        value, unit = float(match[1]), match[2]
        if not math.isfinite(value):
            raise UsageError(f'duration "{text}": too long for a number')
        if unit == "run" and value > 1:
            raise UsageError(f'duration "{text}": a fraction of the run lies in [0, 1]')
        if unit == "it" and value != int(value):
            raise UsageError(f'duration "{text}": steps are whole numbers')
        return cls(value, unit)  # type: ignore[arg-type]

    def steps(self, steps_per_epoch: int, run_steps: int | None = None) -> int:
        """Optimizer steps in this duration, rounded to the nearest whole step.

        Args:
            steps_per_epoch: optimizer steps in one epoch.
            run_steps: steps of the whole run; needed for the unit `"run"`.
        """
        if self.unit == "it":
            return int(self.value)
        if self.unit == "ep":
            return math.floor(self.value * steps_per_epoch + 0.5 + 1e-9)
        if run_steps is None:
            raise UsageError(f'duration "{self}" is a fraction of a run, but the run has no length here')
        return math.floor(self.value * run_steps + 0.5 + 1e-9)

    def __str__(self) -> str:
        return f"{self.value:.15g}{self.unit}"


@dataclass(frozen=True)
class Progress:
    """Where a run stands after `step` of `steps` optimizer steps.

    Examples:
        >>> Progress(step=25, steps=100, steps_per_epoch=10).fraction
        0.25
        >>> Progress(step=25, steps=100, steps_per_epoch=10).epoch_fraction
        0.2
    """

    step: int
    steps: int
    steps_per_epoch: int

    @property
    def fraction(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return min(1.0, self.step / self.steps) if self.steps else 1.0

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.step // max(1, self.steps_per_epoch)

    @property
    def epoch_fraction(self) -> float:
        """Share of the run's epochs that is done; changes once an epoch (DDROP's i / i_max)."""
        return min(1.0, self.epoch * self.steps_per_epoch / self.steps) if self.steps else 1.0
