"""What is wrong with a recipe, as file, line, key, got and expected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from secateur.errors import nearest

__all__ = ["explain", "key_path", "line_of", "shown"]

# Where pydantic speaks of Python's types, in the words of a recipe.
_EXPECTED = {
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "model_attributes_type": "a mapping of keys",
    "string_type": "text",
}


def explain(error: ValidationError, data: Any, path: Path, model: type[BaseModel]) -> str:
    """The foremost mistake in `data`, read from `path`, that `model` finds, in one line."""
    first, more = _foremost(error, model)
    location, _ = _place(first["loc"], model)
    where = f"{path}:{line_of(data, location)}: {key_path(location) or 'recipe'}"
    if first["type"] == "extra_forbidden":
        _, choices = _place(first["loc"][:-1], model)
        return f"{where}: unknown key; {_near(str(location[-1]), _keys(choices))}{more}"
    if first["type"] == "union_tag_invalid":
        context = first.get("ctx", {})
        tags = [tag.strip().strip("'") for tag in str(context.get("expected_tags", "")).split(",")]
        return f'{where}: unknown kind "{context.get("tag")}"; {_near(str(context.get("tag")), tags)}{more}'
    if first["type"] == "union_tag_not_found":
        return f"{where}: it has no kind, which says what it is{more}"
    message = first["msg"].removeprefix("Value error, ")
    if (expected := _EXPECTED.get(first["type"])) is not None:
        return f"{where}: expected {expected}, got {shown(first['input'])}{more}"
    if first["type"] == "too_short":
        least = first["ctx"]["min_length"]
        return f"{where}: expected {least} or more entries, got {first['ctx']['actual_length']}{more}"
    got = first.get("input")
    told = f", got {got!r}" if isinstance(got, str | int | float | bool | None) and first["type"] != "missing" else ""
    if first["type"] == "value_error":
        told = ""
    return f"{where}: {message[0].lower() + message[1:]}{told}{more}"


def _near(name: str, known: Sequence[str]) -> str:
    close = nearest(name, known)
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known)}"


def shown(value: Any) -> str:
    """A value as a message names it."""
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list | tuple) else repr(value)


def line_of(data: Any, location: Sequence[Any]) -> int:
    """Line of the deepest part of `location` that the file itself holds."""
    line = 1
    for part in location:
        try:
            marks = data.lc
            line = (marks.item(part) if isinstance(data, list) else marks.key(part))[0] + 1
            data = data[part]
        except (AttributeError, KeyError, IndexError, TypeError):
            break
    return line


def key_path(location: Sequence[Any]) -> str:
    """A location as `methods[0].label`."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def _foremost(error: ValidationError, model: type[BaseModel]) -> tuple[ErrorDetails, str]:
    """The mistake to tell, and words that say whether there are others in other mappings or lists.

    One mistake has several errors: a misspelled key that is required is also missing, and a list whose entries are
    wrong is also too short.
    """
    found = error.errors()
    places = [tuple(_place(e["loc"], model)[0]) for e in found]
    own = [
        (e, at) for e, at in zip(found, places, strict=True) if not any(at == p[: len(at)] and at != p for p in places)
    ]
    beside = [e for e, at in own if at[:-1] == own[0][1][:-1]]
    first = next((e for e in beside if e["type"] == "extra_forbidden"), own[0][0])
    return first, " (and more elsewhere)" if len(beside) < len(own) else ""


def _place(location: Sequence[Any], model: type[BaseModel]) -> tuple[list[Any], list[type[BaseModel]]]:
    """Where in the file an error is, and what may stand there: pydantic also names validators and kinds on the way."""
    place: list[Any] = []
    choices = [model]
    for part in location:
        if isinstance(part, int):
            place.append(part)
        elif part.startswith("function-"):
            continue
        elif len(choices) > 1 and (tagged := [c for c in choices if _kind(c) == part]):
            choices = tagged
        else:
            place.append(part)
            field = choices[0].model_fields.get(part) if choices else None
            choices = [] if field is None else _inner_models(field.annotation)
    return place, choices


def _kind(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    return None if field is None else next(iter(get_args(field.annotation)), None)


def _keys(choices: Sequence[type[BaseModel]]) -> list[str]:
    return list(choices[0].model_fields) if choices else []


def _inner_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _inner_models(argument)]
