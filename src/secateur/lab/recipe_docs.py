"""Every key of a recipe, as tables generated from the classes that read them. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.explore.specs import check_time
from secateur.lab.recipe import Recipe

__all__ = ["explore_tables", "markdown_table", "recipe_tables"]

# Keys whose own keys another place describes.
_ELSEWHERE = {"fine_tune": "the keys of `train`"}


def recipe_tables() -> str:
    """Every key of a recipe that trains and prunes: one section for each part, in the order in which they appear."""
    return "\n".join(_recipe_section(where, model, _ELSEWHERE) for where, model in _specs("", Recipe, _ELSEWHERE))


def explore_tables() -> str:
    """Every key of a recipe that explores, one section for each part and each kind of section."""
    shared = dict.fromkeys(("data", "model", "train"), "as in any recipe")
    elsewhere = {**shared, "explore": "the sections below, each with its kind", **_ELSEWHERE}
    parts = [_recipe_section(where, model, elsewhere) for where, model in _specs("", ExploreRecipe, elsewhere)]
    for kind in _models(ExploreRecipe.model_fields["explore"].annotation):
        inside = {**shared, **_ELSEWHERE}
        where = f"kind: {next(iter(get_args(kind.model_fields['kind'].annotation)))}"
        parts += [_recipe_section(place, model, inside) for place, model in _specs(where, kind, inside)]
    return "\n".join(parts)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models(argument)]


def _specs(where: str, model: type[BaseModel], elsewhere: Collection[str]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield where, model
    for name, field in model.model_fields.items():
        inner, many = _inner(field.annotation)
        if inner is not None and name not in elsewhere:
            yield from _specs(f"{where}.{name}".lstrip(".") + ("[]" if many else ""), inner, elsewhere)


def _inner(annotation: Any, many: bool = False) -> tuple[type[BaseModel] | None, bool]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, many
    for argument in get_args(annotation):
        found = _inner(argument, many or getattr(annotation, "__origin__", None) is tuple)
        if found[0] is not None:
            return found
    return None, False


def _recipe_section(where: str, model: type[BaseModel], elsewhere: Mapping[str, str]) -> str:
    schema = model.model_json_schema()
    rows = []
    for name, field in model.model_fields.items():
        if _inner(field.annotation)[0] is not None:
            many = _inner(field.annotation)[1]
            default = "none" if field.default is None else f"{'one entry of ' if many else ''}the defaults below"
            meaning = elsewhere.get(name, f"see `{name}` below")
            rows.append((f"`{name}`", "list of mappings" if many else "mapping", default, field.description or meaning))
            continue
        kind = _kind(schema["properties"][name], field)
        default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
        rows.append((f"`{name}`", kind, default, field.description or ""))
    title = f"### `{where}`" if where else "### Top level"
    return f"{title}\n\n{inspect.getdoc(model) or ''}\n\n{markdown_table(('Key', 'Value', 'Default', 'Meaning'), rows)}"


def _kind(schema: dict[str, Any], field: FieldInfo | None = None) -> str:
    """A JSON schema in words: type, choices and range."""
    validators = [*field.metadata, *(m for a in get_args(field.annotation) for m in get_args(a)[1:])] if field else []
    if any(isinstance(v, AfterValidator) and v.func is check_time for v in validators):
        return "time: `90s`, `10min` or `2h`"
    if any(isinstance(v, AfterValidator) for v in validators):
        return f"{'list of durations' if schema['type'] == 'array' else 'duration'}: `30ep`, `500it` or `0.4run`"
    if any(isinstance(v, BeforeValidator) for v in validators):
        return "a name, or a mapping with `name` and hyper-parameters"
    if "anyOf" in schema:
        return " or ".join(_kind(s) for s in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    names = {"array": "list", "object": "mapping", "string": "text", "boolean": "`true` or `false`", "null": "none"}
    text = names.get(schema.get("type", ""), schema.get("type", "name or mapping"))
    if schema.get("type") == "array" and schema.get("items"):
        text = f"list of: {_kind(schema['items'])}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return f"{text}, {', '.join(limits)}" if limits else text


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_yaml(v)}' for k, v in value.items())}}}"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return '""' if value == "" else f'"{value}"' if value in ("*", "@last") else str(value)


def markdown_table(head: tuple[str, ...], rows: list[Any]) -> str:
    # A bar inside a cell, as in |gamma|, would end it.
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |\n" for line in lines)
