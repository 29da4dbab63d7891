"""What is searched over: named numbers with ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np

from secateur.errors import UnknownNameError, UsageError

__all__ = ["STOCHASTIC_PRUNING", "Choice", "Float", "Int", "Number", "Space"]


@dataclass(frozen=True)
class Float:
    """A real number in [low, high].

    Args:
        name: what the objective knows it by.
        low, high: finite, low below high.
        log: uniform in its logarithm; low must then be above 0.
    """

    kind: ClassVar[str] = "float"

    name: str
    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self)
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))

    def draw(self, generator: np.random.Generator) -> float:
        """One at random, uniform (in the logarithm if `log`)."""
        return self._at(float(generator.random()))

    def points(self, count: int) -> list[Any]:
        """`count` numbers evenly apart, both ends among them."""
        return [self._at(i / (count - 1)) for i in range(count)] if count > 1 else [self._at(0.5)]

    def _at(self, share: float) -> float:
        if share in (0.0, 1.0):
            return self.high if share else self.low
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Int:
    """A whole number in [low, high], both ends included.

    Args:
        name: what the objective knows it by.
        low, high: whole numbers, low below high.
        log: uniform in its logarithm; low must then be at least 1.
    """

    kind: ClassVar[str] = "int"

    name: str
    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self)
        if not all(isinstance(end, int) and not isinstance(end, bool) for end in (self.low, self.high)):
            raise UsageError(f'number "{self.name}": got [{self.low!r}, {self.high!r}], expected whole numbers')

    def draw(self, generator: np.random.Generator) -> int:
        """One at random, uniform (in the logarithm if `log`)."""
        if not self.log:
            return int(generator.integers(self.low, self.high, endpoint=True))
        return self._at(float(generator.random()))

    def points(self, count: int) -> list[Any]:
        """At most `count` numbers about evenly apart; all of them where there are no more."""
        if count > self.high - self.low:
            return list(range(self.low, self.high + 1))
        return sorted({self._at((i + 0.5) / count) for i in range(count)})

    def _at(self, share: float) -> int:
        # Half a unit on either side gives the ends as much room as the others.
        low, high = self.low - 0.5, self.high + 0.5
        value = low * (high / low) ** share if self.log else low + share * (high - low)
        return min(max(round(value), self.low), self.high)


@dataclass(frozen=True)
class Choice:
    """One of a few values, without an order.

    Args:
        name: what the objective knows it by.
        values: at least two, all different: strings, numbers or booleans.
    """

    kind: ClassVar[str] = "choice"

    name: str
    values: tuple[str | int | float | bool, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.values))
        _check_name(self.name)
        if len(self.values) < 2 or len(set(self.values)) < len(self.values):
            raise UsageError(
                f'number "{self.name}": got choices {list(self.values)}, expected at least two, all different'
            )
        for value in self.values:
            if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
                raise UsageError(
                    f'number "{self.name}": got choice {value!r}, expected strings, finite numbers or booleans'
                )

    def draw(self, generator: np.random.Generator) -> Any:
        """One at random, each as likely."""
        return self.values[int(generator.integers(len(self.values)))]

    def points(self, count: int) -> list[Any]:
        """All of them, whatever `count`."""
        return list(self.values)


Number = Float | Int | Choice
_KINDS: dict[str, type[Number]] = {kind.kind: kind for kind in (Float, Int, Choice)}


@dataclass(frozen=True)
class Space:
    """Named numbers with ranges, in an order.

    Args:
        numbers: at least one, with different names.

    Examples:
        >>> space = Space((Float("sigma", 1e-4, 1e-2), Int("nets", 1, 5)))
        >>> Space.from_record(space.record()) == space
        True
    """

    numbers: tuple[Number, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "numbers", tuple(self.numbers))
        if not self.numbers:
            raise UsageError("space: no numbers to search over; give at least one, such as Float('sigma', 1e-4, 1e-2)")
        for number in self.numbers:
            if not isinstance(number, Float | Int | Choice):
                raise UsageError(f"space: got {number!r}, expected Float, Int or Choice")
        names = self.names
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f'space: two numbers are named "{twice}"; names must differ')

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(number.name for number in self.numbers)

    def record(self) -> list[dict[str, Any]]:
        """For JSON; `Space.from_record` is its inverse."""
        return [{"kind": number.kind, **_plain(asdict(number))} for number in self.numbers]

    @classmethod
    def from_record(cls, record: Sequence[Mapping[str, Any]]) -> Space:
        """The space whose `record()` this is."""
        numbers = []
        for entry in record:
            rest = dict(entry)
            kind = str(rest.pop("kind", ""))
            if kind not in _KINDS:
                raise UnknownNameError("kind of number", kind, _KINDS)
            known = {f.name for f in fields(_KINDS[kind])}
            if not rest.keys() <= known:
                raise UnknownNameError(f"field of a {kind}", min(rest.keys() - known), known)
            try:
                numbers.append(_KINDS[kind](**rest))
            except TypeError as error:
                raise UsageError(f"space: {entry} is not a {kind} ({error})") from error
        return cls(tuple(numbers))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise UsageError(f"space: got name {name!r}, expected a string that is not empty")


def _check_range(number: Float | Int) -> None:
    _check_name(number.name)
    ends = (number.low, number.high)
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends) or not number.low < number.high:
        raise UsageError(
            f'number "{number.name}": got [{number.low!r}, {number.high!r}], expected finite ends, the lower first; '
            "a number that does not vary belongs in the objective"
        )
    if number.log and number.low <= 0:
        raise UsageError(f'number "{number.name}": got lower end {number.low!r} with log, expected it above 0')


# The ranges of the stochastic-pruning paper.
STOCHASTIC_PRUNING = Space((Float("sigma", 1e-4, 1e-2), Float("sparsity", 0.01, 0.99)))
