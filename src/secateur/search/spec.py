"""How to search: the sampler with all it depends on, how many trials, and what is to be made large or small."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from secateur.errors import UnknownNameError, UsageError
from secateur.search.space import Space

__all__ = ["Direction", "SearchSpec"]

Direction = Literal["maximize", "minimize"]
Sampler = Literal["grid", "random", "nsga2", "tpe"]

_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "grid": ("points",),
    "random": (),
    "nsga2": ("population", "crossover", "swap", "mutation"),
    "tpe": ("startup", "candidates", "multivariate"),
}


@dataclass(frozen=True)
class SearchSpec:
    """A search, apart from the space and the objective.

    Args:
        objectives: (name, "maximize" or "minimize") of each value that the objective returns.
        trials: how many in all, over all workers and all restarts; None asks for the whole grid.
        sampler: "grid", "random", "nsga2" or "tpe".
        seed: at least 0.
        population: trials in a generation of NSGA-II, at least 2.
        crossover: chance that a child has two parents, in [0, 1] (NSGA-II).
        swap: chance that a number comes from the second parent, in [0, 1] (NSGA-II, uniform crossover).
        mutation: chance that a number is drawn anew, in [0, 1]; None is 1 / how many numbers there are (NSGA-II).
        startup: random trials before the model is used, at least 1 (TPE).
        candidates: draws of which the best is tried, at least 1 (TPE).
        multivariate: model the numbers jointly instead of one by one (TPE).
        points: of the grid, for each number: evenly apart, ends included; choices and short ranges of whole numbers
            are taken whole.

    Randomness: trial k draws from a stream of (seed, k) alone. What NSGA-II and TPE propose depends besides on the
    trials that are finished, so that one worker repeats itself exactly, also when it is stopped and goes on, and
    several do not. The grid is tried in an order shuffled by the seed.

    Reference: Deb et al. 2002 (NSGA-II); Bergstra et al. 2011 and Ozaki et al. 2022 (TPE for one and more objectives).
    """

    objectives: tuple[tuple[str, Direction], ...]
    trials: int | None
    sampler: Sampler = "nsga2"
    seed: int = 0
    population: int = 50
    crossover: float = 0.9
    swap: float = 0.5
    mutation: float | None = None
    startup: int = 10
    candidates: int = 24
    multivariate: bool = False
    points: int = 10

    def __post_init__(self) -> None:
        object.__setattr__(self, "objectives", tuple((name, direction) for name, direction in self.objectives))
        if not self.objectives:
            raise UsageError("search: no objectives; expected at least one, such as ('accuracy', 'maximize')")
        if len(set(self.names)) < len(self.names):
            raise UsageError(f"search: objectives {', '.join(self.names)}: names must differ")
        for name, direction in self.objectives:
            if not isinstance(name, str) or not name or direction not in get_args(Direction):
                raise UsageError(
                    f"search: objective ({name!r}, {direction!r}): expected a name and maximize or minimize"
                )
        if self.sampler not in _ARGUMENTS:
            raise UnknownNameError("sampler", str(self.sampler), _ARGUMENTS)
        if self.trials is None and self.sampler != "grid":
            raise UsageError(f"search: sampler {self.sampler} does not end by itself; say how many trials")
        for field, least in (
            ("trials", 1),
            ("seed", 0),
            ("population", 2),
            ("startup", 1),
            ("candidates", 1),
            ("points", 1),
        ):
            value = getattr(self, field)
            if value is None and field == "trials":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"search: {field}: got {value!r}, expected a whole number, at least {least}")
        for field in ("crossover", "swap", "mutation"):
            value = getattr(self, field)
            if value is None and field == "mutation":
                continue
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                raise UsageError(f"search: {field}: got {value!r}, expected a chance in [0, 1]")

    @property
    def names(self) -> tuple[str, ...]:
        """Of the objectives."""
        return tuple(name for name, _ in self.objectives)

    @property
    def directions(self) -> tuple[Direction, ...]:
        return tuple(direction for _, direction in self.objectives)

    def record(self) -> dict[str, Any]:
        """For JSON; `SearchSpec.from_record` is its inverse."""
        return {**asdict(self), "objectives": [list(pair) for pair in self.objectives]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> SearchSpec:
        """The specification whose `record()` this is."""
        known = [f.name for f in fields(cls)]
        for name in record:
            if name not in known:
                raise UnknownNameError("field of a search", name, known)
        try:
            return cls(**record)
        except TypeError as error:
            raise UsageError(f"search: not the record of a search ({error})") from error

    def total(self, space: Space) -> int:
        """How many trials there are in all.

        Raises: `UsageError` for more trials than the grid has points.
        """
        if self.sampler != "grid":
            assert self.trials is not None
            return self.trials
        size = math.prod(len(number.points(self.points)) for number in space.numbers)
        if self.trials is not None and self.trials > size:
            raise UsageError(
                f"search: {self.trials} trials of a grid of {size} points; ask for at most {size}, or more points"
            )
        return size if self.trials is None else self.trials

    def fingerprint(self, space: Space, basis: str | Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the trials of one study share, flat, for JSON: all but how many there are to be."""
        flat: dict[str, Any] = {"numbers": list(space.names), "objectives": [list(pair) for pair in self.objectives]}
        flat |= {f"number {entry['name']}": entry for entry in space.record()}
        flat |= {"sampler": self.sampler, "seed": self.seed}
        flat |= {f"{self.sampler} {name}": getattr(self, name) for name in _ARGUMENTS[self.sampler]}
        if isinstance(basis, Mapping):
            return flat | {f"basis {name}": value for name, value in basis.items()}
        return flat | {"basis": basis}
