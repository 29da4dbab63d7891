"""What the documentation says about methods and recipes, generated from the classes themselves. Imports no torch.

A page holds generated text between `<!-- generated: KEY -->` and `<!-- end generated -->`; `refresh_docs` writes
it, and a test asserts that nothing is stale.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from secateur.criteria import CRITERIA
from secateur.errors import UnknownNameError, UsageError
from secateur.lab.plugins import method_class
from secateur.lab.recipe_docs import explore_tables, markdown_table, recipe_tables
from secateur.regularizers import REGULARIZERS

__all__ = [
    "argument_notes",
    "comparison_table",
    "header_table",
    "method_rows",
    "parameter_table",
    "refresh",
    "refresh_docs",
]

_BLOCK = re.compile(r"(<!-- generated: (?P<key>[^>]+?) -->\n).*?(<!-- end generated -->)", re.DOTALL)
_WHOLE = {"recipe": recipe_tables, "explore": explore_tables}
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
    return markdown_table(("Name", f"`{name}`"), lines)


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
    return markdown_table(("Name", "Type", "Default", "Meaning"), rows)


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
    return markdown_table(("Name", *columns.values()), rows)


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
        `methods score`, `recipe`, `explore`.
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
    if key in _WHOLE:
        return _WHOLE[key]()
    raise UsageError(
        f'generated block "{key}": expected header NAME, parameters NAME, methods train|score, recipe or explore'
    )


def _row(name: str) -> dict[str, Any]:
    rows = {row["name"]: row for row in method_rows()}
    if name not in rows:
        raise UnknownNameError("method", name, rows)
    return rows[name]


def _class(row: dict[str, Any]) -> Any:
    return (CRITERIA if row["phase"] == "score" else REGULARIZERS).load(row["name"])


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
