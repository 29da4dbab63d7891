"""Names to classes, without importing a class before it is asked for.

A registry holds `name -> "module:attribute"` lines for what ships with secateur, and finds what others
ship through an entry-point group. `python:module:attribute` names code outside both; because loading it
runs that code, it must come from the caller (`allow_code`), never from a recipe alone.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from secateur.errors import UnknownNameError, UsageError

__all__ = ["Registry", "code_hash", "load_attribute", "load_python"]


def load_attribute(path: str) -> Any:
    """Import `"module:attribute"` and return the attribute.

    Examples:
        >>> load_attribute("math:pi") > 3
        True
    """
    module_name, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module_name), attribute)


def load_python(name: str, allow_code: Collection[str] = ()) -> Any:
    """Load `python:module:attribute`, if the caller named `module` (or a parent of it) in `allow_code`.

    Raises `UsageError` when the name is malformed, not allowed, or does not import.
    """
    parts = name.split(":")
    if len(parts) != 3 or parts[0] != "python" or not parts[1] or not parts[2]:
        raise UsageError(f'"{name}" is not importable: expected python:module:attribute')
    module = parts[1]
    if not any(module == allowed or module.startswith(allowed + ".") for allowed in allow_code):
        raise UsageError(
            f'"{name}" would run code from module "{module}", which the caller did not allow; '
            f"pass --allow-code {module} (or allow_code=[{module!r}]) if you trust it"
        )
    try:
        return load_attribute(f"{module}:{parts[2]}")
    except (ImportError, AttributeError) as error:
        raise UsageError(f'"{name}" does not import: {error}; check the module path and PYTHONPATH') from error


def code_hash(name: str, allow_code: Collection[str] = ()) -> str | None:
    """SHA-256 of the source file behind a `python:` name, None for any other: what a cached result depends on.

    Only the named module's own file counts, not what it imports.
    """
    if not name.startswith("python:"):
        return None
    load_python(name, allow_code)
    file = importlib.import_module(name.split(":")[1]).__file__
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


@dataclass(frozen=True)
class Registry:
    """Lazily loaded classes of one kind.

    Args:
        kind: what one entry is, for messages ("criterion").
        group: entry-point group where other packages register theirs.
        builtin: name -> "module:attribute" of what ships here.
    """

    kind: str
    group: str
    builtin: Mapping[str, str]

    def names(self) -> list[str]:
        """Every known name, built-in first, in registration order."""
        extra = [entry.name for entry in entry_points(group=self.group) if entry.name not in self.builtin]
        return [*self.builtin, *sorted(extra)]

    def load(self, name: str, allow_code: Collection[str] = ()) -> Any:
        """The class registered as `name`; `UnknownNameError` names the nearest three otherwise."""
        if name in self.builtin:
            return load_attribute(self.builtin[name])
        if name.startswith("python:"):
            return load_python(name, allow_code)
        for entry in entry_points(group=self.group):
            if entry.name == name:
                return entry.load()
        raise UnknownNameError(self.kind, name, self.names())
