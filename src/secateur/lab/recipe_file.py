"""Reading recipe files: YAML 1.2, overrides, and errors that name file, line, key, got and expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.scalarbool import ScalarBoolean

from secateur.errors import RecipeError, UnknownNameError, UsageError
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.plugins import make_criterion, make_regularizer
from secateur.lab.recipe import PruneSpec, Recipe
from secateur.lab.recipe_errors import explain, key_path, line_of, shown

__all__ = ["check_plugins", "load_any", "load_recipe", "shipped_recipes", "write_recipe"]


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with secateur, by name."""
    folder = Path(str(files("secateur"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, allow_code: Collection[str] = ()) -> Recipe:
    """Read, override and validate a recipe that trains and prunes; see `load_any`.

    Raises: `RecipeError`, also for a recipe that explores.
    """
    recipe = load_any(source, overrides, allow_code=allow_code)
    if isinstance(recipe, ExploreRecipe):
        raise RecipeError(f"{source}: it explores variants of one network; expected a recipe that trains and prunes")
    return recipe


def load_any(
    source: str | Path, overrides: Sequence[str] = (), *, allow_code: Collection[str] = ()
) -> Recipe | ExploreRecipe:
    """Read, override and validate a recipe: one with the key `explore` explores, any other trains and prunes.

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
        got = "an empty file" if data is None else shown(data)
        raise RecipeError(f"{path}: a recipe is a mapping of keys, got {got}")
    for text in overrides:
        _override(data, text)
    kind: type[Recipe] | type[ExploreRecipe] = ExploreRecipe if "explore" in data else Recipe
    try:
        recipe = kind.model_validate(_plain(data, data, path, []))
    except RecursionError as error:
        raise RecipeError(f"{path}: contains itself, or is nested too deep") from error
    except ValidationError as error:
        raise RecipeError(explain(error, data, path, kind)) from error
    check_plugins(recipe, allow_code, lambda location: f"{path}:{line_of(data, location)}: ")
    return recipe


def write_recipe(recipe: Recipe | ExploreRecipe, path: Path) -> None:
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
        f"{path}:{line_of(data, location)}: {key_path(location)}: got {shown}, expected text, a finite number, "
        "true, false, a list or a mapping"
    )


_Checks = list[tuple[list[Any], Callable[[], object]]]


def check_plugins(
    recipe: Recipe | ExploreRecipe, allow_code: Collection[str], where: Callable[[list[Any]], str] = lambda location: ""
) -> None:
    """Raise `RecipeError` for a criterion, regularizer or network that does not exist or does not take its parameters.

    Args:
        where: what the error begins with, for a place in the recipe.
    """
    if isinstance(recipe, ExploreRecipe):
        checks = _explored(recipe, allow_code)
    else:
        checks = _compared(recipe, allow_code)
    checks.append((["model", "name"], lambda: _check_model(recipe.model.name, allow_code)))
    for location, check in checks:
        try:
            check()
        except UsageError as error:
            raise RecipeError(f"{where(location)}{key_path(location)}: {error}") from error


def _explored(recipe: ExploreRecipe, allow_code: Collection[str]) -> _Checks:
    checks: _Checks = [(["regularizer"], lambda: make_regularizer(recipe.regularizer, allow_code))]
    for number, section in enumerate(recipe.explore):
        plugins: list[tuple[list[Any], Any]] = [(["criterion"], getattr(section, "criterion", None))]
        plugins += [(["criteria", i], plugin) for i, plugin in enumerate(getattr(section, "criteria", ()))]
        for key, plugin in plugins:
            if plugin is not None:
                checks.append((["explore", number, *key], lambda p=plugin, s=section: _check_ranking(p, s, allow_code)))  # type: ignore[misc]
    return checks


def _compared(recipe: Recipe, allow_code: Collection[str]) -> _Checks:
    return [
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
    ]


def _check_criterion(plugin: dict[str, Any], spec: PruneSpec, allow_code: Collection[str]) -> None:
    criterion = make_criterion(plugin, allow_code)
    if spec.granularity != "unit" and "weight" not in criterion.granularities:
        raise UsageError(
            f'{plugin["name"]} gives one score per unit, but the granularity is "{spec.granularity}"; '
            "use granularity unit (a method's own prune: [...] says which entries it takes)"
        )


def _check_ranking(plugin: dict[str, Any], section: Any, allow_code: Collection[str]) -> None:
    criterion = make_criterion(plugin, allow_code)
    # `criteria` and `vary: units` rank units.
    weights = section.kind != "oracle" and getattr(section, "vary", "weights") == "weights"
    if weights and "weight" not in criterion.granularities:
        raise UsageError(f"{plugin['name']} gives one score per unit, and single weights are removed; name another")
    if "learned" in criterion.wanted():
        raise UsageError(f"{plugin['name']} needs what training learned, and an exploration has none; name another")


def _check_model(name: str, allow_code: Collection[str]) -> None:
    from secateur.lab.models import MODELS
    from secateur.registry import load_python

    if name.startswith("python:"):
        load_python(name, allow_code)
    elif not name.startswith(("torchvision:", "timm:")) and name not in MODELS.builtin:
        if name not in MODELS.names():
            raise UnknownNameError("model", name, MODELS.names(), "or torchvision:NAME, timm:NAME")
        MODELS.load(name)
