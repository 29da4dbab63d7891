"""What the documentation says about methods and recipes, generated from the classes themselves. Imports no torch.

A page holds generated text between `<!-- generated: KEY -->` and `<!-- end generated -->`; `refresh_docs` writes
it, and a test asserts that nothing is stale.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from secateur.criteria import CRITERIA
from secateur.errors import UnknownNameError, UsageError
from secateur.lab.plugins import method_class
from secateur.lab.recipe import Recipe
from secateur.regularizers import REGULARIZERS

__all__ = [
    "argument_notes",
    "comparison_table",
    "header_table",
    "method_rows",
    "parameter_table",
    "recipe_tables",
    "refresh",
    "refresh_docs",
]

_BLOCK = re.compile(r"(<!-- generated: (?P<key>[^>]+?) -->\n).*?(<!-- end generated -->)", re.DOTALL)
_ENTRY = re.compile(r"^ {4}(?P<names>\w+(?:, \w+)*): (?P<text>.*)$")


def method_rows() -> list[dict[str, Any]]:
    """Every criterion and regularizer with what its class declares; imports no torch itself.

    What an installed package registers and cannot be used is left out: `secateur.lab.plugins.broken_entries` says why.
    """
    rows = []
    for registry, phase in ((REGULARIZERS, "train"), (CRITERIA, "score")):
        for name in registry.names():
            try:
                kind = method_class(registry, name)
            except UsageError:
                continue
            rows.append(
                {
                    "name": name,
                    "kind": registry.kind,
                    "phase": phase,
                    "needs": sorted(kind.needs) if phase == "score" else [kind.acts_on],
                    "granularities": list(kind.granularities),
                    "state": "none" if phase == "score" else kind.state,
                    "cost": kind.cost,
                    "paper": kind.paper,
                    "summary": kind.summary,
                }
            )
    return rows


def header_table(name: str) -> str:
    """The table at the head of a method's card, as Markdown."""
    row = _row(name)
    kind = _class(row)
    acts = "Needs" if row["phase"] == "score" else "Acts on"
    lines = [
        ("Kind", row["kind"]),
        ("Class", f"`{kind.__module__}.{kind.__qualname__}`"),
        ("Summary", row["summary"]),
        ("Granularities", _code(row["granularities"])),
        (acts, _code(row["needs"])),
        ("State", row["state"]),
        ("Cost", row["cost"]),
        ("Origin", row["paper"]),
    ]
    return _table(("Name", f"`{name}`"), lines)


def parameter_table(name: str) -> str:
    """Every hyper-parameter of a method: name, type, default, and what its class documents about it."""
    kind = _class(_row(name))
    own = [f for f in fields(kind) if f.init]
    if not own:
        return "None.\n"
    notes = argument_notes(kind)
    rows = [
        (
            f"`{f.name}`",
            f"`{f.type}`",
            "required" if f.default is MISSING else f"`{f.default!r}`",
            notes.get(f.name, ""),
        )
        for f in own
    ]
    return _table(("Name", "Type", "Default", "Meaning"), rows)


def comparison_table(phase: str) -> str:
    """All methods of one phase (`"train"` or `"score"`) side by side; names link to their cards."""
    columns = {"summary": "Summary", "granularities": "Granularities"}
    columns["needs"] = "Acts on" if phase == "train" else "Needs"
    if phase == "train":
        columns["state"] = "State"
    columns |= {"cost": "Cost", "paper": "Origin"}
    rows = []
    for row in method_rows():
        if row["phase"] == phase:
            cells = [", ".join(row[c]) if isinstance(row[c], list) else row[c] for c in columns]
            rows.append((f"[`{row['name']}`]({row['name']}.md)", *cells))
    return _table(("Name", *columns.values()), rows)


def recipe_tables() -> str:
    """Every key of a recipe: one section for each part, in the order in which the parts appear."""
    parts = [_recipe_section(where, model) for where, model in _specs("", Recipe)]
    return "\n".join(parts)


def argument_notes(kind: type) -> dict[str, str]:
    """What the `Args:` section of a class's docstring says about each name.

    Examples:
        >>> from secateur.criteria.magnitude import Magnitude
        >>> argument_notes(Magnitude)["order"].split(",")[0]
        '1 or 2'
    """
    notes: dict[str, str] = {}
    names: list[str] = []
    _, found, section = (inspect.getdoc(kind) or "").partition("Args:\n")
    for line in section.splitlines() if found else []:
        if line and not line.startswith("    "):
            break
        if entry := _ENTRY.match(line):
            names = entry["names"].split(", ")
            notes.update(dict.fromkeys(names, entry["text"].strip()))
        elif line.strip() and names:
            notes.update({name: f"{notes[name]} {line.strip()}" for name in names})
    return notes


def refresh(text: str) -> str:
    """`text` with every generated block brought up to date.

    Raises: `UsageError` for a block whose key is none of `header NAME`, `parameters NAME`, `methods train`,
        `methods score`, `recipe`.
    """
    return _BLOCK.sub(lambda m: f"{m[1]}\n{_generate(m['key'])}\n{m[3]}", text)


def refresh_docs(folder: str | Path) -> list[Path]:
    """Bring every Markdown page under `folder` up to date; returns the pages that changed."""
    changed = []
    for path in sorted(Path(folder).rglob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = refresh(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    return changed


def _generate(key: str) -> str:
    what, _, name = key.partition(" ")
    if what == "header":
        return header_table(name)
    if what == "parameters":
        return parameter_table(name)
    if what == "methods" and name in ("train", "score"):
        return comparison_table(name)
    if key == "recipe":
        return recipe_tables()
    raise UsageError(f'generated block "{key}": expected header NAME, parameters NAME, methods train|score or recipe')


def _row(name: str) -> dict[str, Any]:
    rows = {row["name"]: row for row in method_rows()}
    if name not in rows:
        raise UnknownNameError("method", name, rows)
    return rows[name]


def _class(row: dict[str, Any]) -> Any:
    return (CRITERIA if row["phase"] == "score" else REGULARIZERS).load(row["name"])


def _specs(where: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield where, model
    for name, field in model.model_fields.items():
        inner, many = _inner(field.annotation)
        # A fine-tuning is described by the keys of train; once is enough.
        if inner is not None and name != "fine_tune":
            yield from _specs(f"{where}.{name}".lstrip(".") + ("[]" if many else ""), inner)


def _inner(annotation: Any, many: bool = False) -> tuple[type[BaseModel] | None, bool]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, many
    for argument in get_args(annotation):
        found = _inner(argument, many or getattr(annotation, "__origin__", None) is tuple)
        if found[0] is not None:
            return found
    return None, False


def _recipe_section(where: str, model: type[BaseModel]) -> str:
    schema = model.model_json_schema()
    rows = []
    for name, field in model.model_fields.items():
        if _inner(field.annotation)[0] is not None:
            many = _inner(field.annotation)[1]
            default = "none" if field.default is None else f"{'one entry of ' if many else ''}the defaults below"
            meaning = "the keys of `train`" if name == "fine_tune" else f"see `{name}` below"
            rows.append((f"`{name}`", "list of mappings" if many else "mapping", default, field.description or meaning))
            continue
        kind = _kind(schema["properties"][name], field)
        default = "required" if field.is_required() else f"`{_yaml(field.default)}`"
        rows.append((f"`{name}`", kind, default, field.description or ""))
    title = f"### `{where}`" if where else "### Top level"
    return f"{title}\n\n{inspect.getdoc(model) or ''}\n\n{_table(('Key', 'Value', 'Default', 'Meaning'), rows)}"


def _kind(schema: dict[str, Any], field: FieldInfo | None = None) -> str:
    """A JSON schema in words: type, choices and range."""
    validators = [*field.metadata, *(m for a in get_args(field.annotation) for m in get_args(a)[1:])] if field else []
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


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    # A bar inside a cell, as in |gamma|, would end it.
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |\n" for line in lines)
