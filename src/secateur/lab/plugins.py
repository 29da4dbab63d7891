"""From `{name: ..., parameter: ...}` to a criterion or regularizer, with errors that name the nearest key."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from secateur.criteria import CRITERIA
from secateur.criteria.base import Criterion
from secateur.errors import UnknownNameError, UsageError
from secateur.registry import Registry
from secateur.regularizers import REGULARIZERS
from secateur.regularizers.base import Regularizer

__all__ = ["make_criterion", "make_regularizer"]


def make_criterion(spec: Mapping[str, Any], allow_code: Collection[str] = ()) -> Criterion:
    """The criterion a recipe describes.

    Examples:
        >>> make_criterion({"name": "magnitude", "order": 1})
        Magnitude(order=1)
    """
    return cast(Criterion, _make(CRITERIA, spec, Criterion, allow_code))


def make_regularizer(spec: Mapping[str, Any], allow_code: Collection[str] = ()) -> Regularizer:
    """The regularizer a recipe describes."""
    return cast(Regularizer, _make(REGULARIZERS, spec, Regularizer, allow_code))


def _make(registry: Registry, spec: Mapping[str, Any], base: type, allow_code: Collection[str]) -> Any:
    parameters = dict(spec)
    name = parameters.pop("name", None)
    if not isinstance(name, str):
        raise UsageError(f"{registry.kind}: expected a name, got {spec!r}; known: {', '.join(registry.names())}")
    kind = registry.load(name, allow_code)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise UsageError(f'{registry.kind} "{name}" is not a subclass of {base.__name__}')
    known = [f.name for f in fields(cast(Any, kind)) if f.init]
    for key in parameters:
        if key not in known:
            raise UnknownNameError(f"parameter of {registry.kind} {name}", key, known)
    try:
        return TypeAdapter(kind).validate_python(parameters)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{registry.kind} {name}: " + (f"{where}: {message}" if where else message)) from error
