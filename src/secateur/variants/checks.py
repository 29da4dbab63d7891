"""What the numbers and names of a variant may be; each check gives the value as it is stored, of a type JSON knows."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from secateur.errors import UnknownNameError, UsageError

__all__ = ["finite", "integer", "known_name", "stored_integers", "text", "unit_pairs"]


def finite(name: str, value: Any, low: float, below: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < below:
        bound = f"at least {low:g} and finite" if below == math.inf else f"in [{low:g}, {below:g})"
        raise UsageError(f"variant: {name} is a number {bound}, got {value!r}")


def integer(name: str, value: Any) -> int:
    """Also of NumPy's and other types that stand for an integer."""
    try:
        found = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = -1
    if found < 0:
        raise UsageError(f"variant: {name} is an integer, at least 0, got {value!r}")
    return found


def stored_integers(variant: object, *names: str) -> None:
    """The named fields of a frozen dataclass, checked and replaced by plain integers."""
    for name in names:
        object.__setattr__(variant, name, integer(name, getattr(variant, name)))


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"variant: {name} is a name, got {value!r}")
    return value


def known_name(name: str, value: Any, known: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise UnknownNameError(name, str(value), known)


def unit_pairs(name: str, pairs: Any) -> tuple[tuple[str, int], ...]:
    """(layer, number) pairs; from JSON they come as lists, which no dictionary of variants would take."""
    try:
        split = [(layer, number) for layer, number in pairs]
    except (TypeError, ValueError):
        split = [(None, 0)]
    if not all(isinstance(layer, str) for layer, _ in split):
        raise UsageError(f"variant: {name} is pairs of a layer's name and a number, got {pairs!r}")
    return tuple((layer, integer(name, number)) for layer, number in split)
