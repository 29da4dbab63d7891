"""Reading recipe files: YAML 1.2, overrides, and errors that name file, line, key, got and expected."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from secateur.errors import RecipeError, UnknownNameError, UsageError, nearest
from secateur.lab.plugins import make_criterion, make_regularizer
from secateur.lab.recipe import PruneSpec, Recipe

__all__ = ["load_recipe", "shipped_recipes", "write_recipe"]


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with secateur, by name."""
    folder = Path(str(files("secateur"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, allow_code: Collection[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        source: path of a YAML file, or the name of a shipped recipe.
        overrides: `"key.path=value"` assignments; list entries by number (`methods.0.label=plain`); values are
            read as YAML.
        allow_code: modules that `python:` names in the recipe may come from.

    Raises: `RecipeError` as `file:line: key path: got ...; expected ...`.
    """
    path = _find(source)
    data = _parse(path)
    if not isinstance(data, dict):
        got = "an empty file" if data is None else _shown(data)
        raise RecipeError(f"{path}: a recipe is a mapping of keys, got {got}")
    for text in overrides:
        _override(data, text)
    try:
        recipe = Recipe.model_validate(_plain(data, data, path, []))
    except RecursionError as error:
        raise RecipeError(f"{path}: contains itself, or is nested too deep") from error
    except ValidationError as error:
        raise RecipeError(_explain(error, data, path)) from error
    _check_plugins(recipe, data, path, allow_code)
    return recipe


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML."""
    yaml = YAML()
    yaml.default_flow_style = False
    with path.open("w", encoding="utf-8") as stream:
        yaml.dump(recipe.resolved(), stream)


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if str(source) in shipped:
        return shipped[str(source)]
    if path.is_dir():
        inside = f", such as {path / 'recipe.yaml'}" if (path / "recipe.yaml").is_file() else ""
        raise RecipeError(f"{path}: is a folder; expected a recipe file{inside}, or the name of a shipped recipe")
    if path.suffix in (".yaml", ".yml") or path.parent != Path("."):
        raise RecipeError(f"{path}: no such recipe file")
    raise UnknownNameError("recipe", str(source), shipped, "or give the path of a YAML file")


def _parse(path: Path) -> Any:
    try:
        return YAML().load(path.read_text(encoding="utf-8"))
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    except (YAMLError, ValueError, OSError, RecursionError) as error:
        raise RecipeError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error


def _override(data: Any, text: str) -> None:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UsageError(f'--set "{text}": expected key.path=value')
    *parents, last = parts = key.split(".")
    for part, following in zip(parents, parts[1:], strict=True):
        data = _step_into(data, part, text)
        if data == {} and following.isdecimal():
            raise UsageError(
                f'--set "{text}": the recipe has no {part} to change; list them in the file, or set {part}=[...]'
            )
    try:
        parsed = YAML(typ="safe").load(value) if value else None
    except (YAMLError, ValueError) as error:
        raise UsageError(f'--set "{text}": the value is not valid YAML; quote it') from error
    if isinstance(data, list):
        data[_list_index(data, last, text)] = parsed
    elif isinstance(data, dict):
        data[last] = parsed
    else:
        raise UsageError(f'--set "{text}": "{".".join(parents)}" is a plain value and has no key "{last}"')


def _step_into(data: Any, part: str, text: str) -> Any:
    if isinstance(data, list):
        return data[_list_index(data, part, text)]
    if not isinstance(data, dict):
        raise UsageError(f'--set "{text}": nothing to set below "{part}"')
    if isinstance(data.get(part), str):
        data[part] = {"name": data[part]}  # `criterion: magnitude` is short for `{name: magnitude}`
    if data.get(part) is None:
        data[part] = {}
    return data[part]


def _list_index(data: list[Any], part: str, text: str) -> int:
    if not part.isdecimal() or int(part) >= len(data):
        raise UsageError(f'--set "{text}": "{part}" is no entry of a list of {len(data)} (numbered from 0)')
    return int(part)


def _plain(value: Any, data: Any, path: Path, location: list[Any]) -> Any:
    """`value`, found at `location` of `data`, as JSON would have it: no dates, tags, sets, infinities."""
    if isinstance(value, dict):
        return {str(k): _plain(v, data, path, [*location, k]) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v, data, path, [*location, i]) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, ScalarBoolean):
        return bool(value)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    shown = repr(value) if isinstance(value, float) else f"a {type(value).__name__}"
    raise RecipeError(
        f"{path}:{_line(data, location)}: {_key_path(location)}: got {shown}, expected text, a finite number, "
        "true, false, a list or a mapping"
    )


def _explain(error: ValidationError, data: Any, path: Path) -> str:
    first, more = _foremost(error)
    location = _location(first)
    where = f"{path}:{_line(data, location)}: {_key_path(location) or 'recipe'}"
    if first["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = nearest(str(location[-1]), known)
        hint = f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known)}"
        return f"{where}: unknown key; {hint}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if (expected := _EXPECTED.get(first["type"])) is not None:
        return f"{where}: expected {expected}, got {_shown(first['input'])}{more}"
    got = first.get("input")
    shown = f", got {got!r}" if isinstance(got, str | int | float | bool | None) and first["type"] != "missing" else ""
    if first["type"] == "value_error":
        shown = ""
    return f"{where}: {message[0].lower() + message[1:]}{shown}{more}"


# Where pydantic speaks of Python's types, in the words of a recipe.
_EXPECTED = {
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "string_type": "text",
}


def _shown(value: Any) -> str:
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list | tuple) else repr(value)


def _location(error: ErrorDetails) -> list[Any]:
    return [part for part in error["loc"] if not (isinstance(part, str) and part.startswith("function-"))]


def _foremost(error: ValidationError) -> tuple[ErrorDetails, str]:
    """The mistake to tell, and words that say whether there are others in other mappings or lists.

    One mistake has several errors: a misspelled key that is required is also missing, and a list whose entries are
    wrong is also too short.
    """
    found = error.errors()
    places = [tuple(_location(e)) for e in found]
    own = [e for e, at in zip(found, places, strict=True) if not any(at == p[: len(at)] and at != p for p in places)]
    parents = [tuple(_location(e)[:-1]) for e in own]
    beside = [e for e, parent in zip(own, parents, strict=True) if parent == parents[0]]
    first = next((e for e in beside if e["type"] == "extra_forbidden"), own[0])
    return first, " (and more elsewhere)" if len(beside) < len(own) else ""


def _line(data: Any, location: Sequence[Any]) -> int:
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


def _key_path(location: Sequence[Any]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def _known_keys(location: Sequence[Any]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        model = _inner_model(model.model_fields[part].annotation)
        if model is None:
            return []
    return list(model.model_fields)


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if (found := _inner_model(argument)) is not None:
            return found
    return None


def _check_plugins(recipe: Recipe, data: Any, path: Path, allow_code: Collection[str]) -> None:
    checks: list[tuple[list[Any], Any]] = [
        *(
            (["methods", i, "regularizer"], lambda m=m: make_regularizer(m.regularizer, allow_code))
            for i, m in enumerate(recipe.methods)
        ),
        *(
            (["prune", i, "criterion"], lambda p=p: _check_criterion(p.criterion, p, allow_code))
            for i, p in enumerate(recipe.prune)
        ),
        *(
            (["methods", i, "criterion"], lambda m=m, p=p: _check_criterion(m.criterion, p, allow_code))
            for i, m in enumerate(recipe.methods)
            for _, p in recipe.ways(m)
            if m.criterion is not None
        ),
        (["model", "name"], lambda: _check_model(recipe.model.name, allow_code)),
    ]
    for location, check in checks:
        try:
            check()
        except UsageError as error:
            raise RecipeError(f"{path}:{_line(data, location)}: {_key_path(location)}: {error}") from error


def _check_criterion(plugin: dict[str, Any], spec: PruneSpec, allow_code: Collection[str]) -> None:
    criterion = make_criterion(plugin, allow_code)
    if spec.granularity != "unit" and "weight" not in criterion.granularities:
        raise UsageError(
            f'{plugin["name"]} gives one score per unit, but the granularity is "{spec.granularity}"; '
            "use granularity unit (a method's own prune: [...] says which entries it takes)"
        )


def _check_model(name: str, allow_code: Collection[str]) -> None:
    from secateur.lab.models import MODELS
    from secateur.registry import load_python

    if name.startswith("python:"):
        load_python(name, allow_code)
    elif not name.startswith(("torchvision:", "timm:")) and name not in MODELS.builtin:
        if name not in MODELS.names():
            raise UnknownNameError("model", name, MODELS.names(), "or torchvision:NAME, timm:NAME")
        MODELS.load(name)
