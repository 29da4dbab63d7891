"""What a search found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.search.pareto import front, hypervolume_series
from secateur.search.space import Space
from secateur.search.spec import SearchSpec

__all__ = ["SearchResult", "TrialRecord"]


@dataclass(frozen=True)
class TrialRecord:
    """One finished trial.

    Args:
        trial: which of the trials asked for, from 0.
        numbers: what was tried.
        values: of each objective; None for a failed trial.
        extras: whatever else the objective returned.
        reason: why it failed; None for one that did not.
        worker: who ran it.
        seconds: from asking to telling.
    """

    trial: int
    numbers: Mapping[str, Any]
    values: Mapping[str, float] | None
    extras: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    worker: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.values is None

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "trial": self.trial,
            "numbers": dict(self.numbers),
            "values": None if self.values is None else dict(self.values),
            "extras": dict(self.extras),
            "reason": self.reason,
            "worker": self.worker,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class SearchResult:
    """All finished trials of a study, those of other workers and earlier runs among them.

    Args:
        spec, space: what was asked for.
        trials: by their number; the failed ones among them.
        total: how many were asked for.
        optuna: version of the library that proposed them.
    """

    spec: SearchSpec
    space: Space
    trials: tuple[TrialRecord, ...]
    total: int
    optuna: str

    @property
    def finished(self) -> bool:
        """Whether nothing is left to try."""
        return len(self.trials) >= self.total

    @property
    def failed(self) -> tuple[TrialRecord, ...]:
        return tuple(trial for trial in self.trials if trial.failed)

    def front(self) -> tuple[TrialRecord, ...]:
        """The trials that no other dominates; failed ones are not among them."""
        whole = self._whole()
        return tuple(whole[index] for index in front(self._points(), self.spec.directions))

    def hypervolume_series(self, reference: Sequence[float]) -> list[float]:
        """The hypervolume after each trial that did not fail (2 or 3 objectives)."""
        return hypervolume_series(self._points(), reference, self.spec.directions)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "spec": self.spec.record(),
            "space": self.space.record(),
            "total": self.total,
            "optuna": self.optuna,
            "trials": [trial.record() for trial in self.trials],
        }

    def _whole(self) -> list[TrialRecord]:
        return [trial for trial in self.trials if not trial.failed]

    def _points(self) -> list[list[float]]:
        return [[trial.values[name] for name in self.spec.names] for trial in self._whole() if trial.values is not None]
