"""Names to classes, without importing a class before it is asked for.

A registry holds `name -> "module:attribute"` lines for what ships with secateur, and finds what others
ship through an entry-point group. `python:module:attribute` names code outside both; because loading it
runs that code, it must come from the caller (`allow_code`), never from a recipe alone.
"""

from __future__ import annotations

import hashlib
import importlib
import traceback
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from secateur.errors import UnknownNameError, UsageError

__all__ = ["Registry", "load_attribute", "load_python", "raised_at"]

_OURS = "secateur"


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

    Raises `UsageError` when the name is malformed, not allowed, or does not import, whatever that module raises.
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
    except (Exception, SystemExit) as error:
        raise UsageError(
            f'"{name}" does not import: {raised_at(error, {_top(module)})}; check the module, its path and PYTHONPATH'
        ) from error


def raised_at(error: BaseException, packages: Collection[str]) -> str:
    """What was raised, in one line, and the last line of `packages` that it passed through."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if _top(frame.f_globals.get("__name__", "")) in packages:
            code = frame.f_code
            inside = "" if code.co_name == "<module>" else f", in {code.co_name}"
            return f"{text} ({Path(code.co_filename).name}:{line}{inside})"
    return text


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
        """Every known name, built-in first, then what other packages register; none of it is loaded."""
        return [*self.builtin, *sorted({e.name for e in self.entries()} - self.builtin.keys())]

    def entries(self) -> list[EntryPoint]:
        """What other packages register, those included that bear the name of something built in and are ignored."""
        return list(entry_points(group=self.group))

    def load(self, name: str, allow_code: Collection[str] = ()) -> Any:
        """The class registered as `name`.

        Raises: `UnknownNameError` that names the nearest three; `UsageError` if it belongs to another package and
            does not load, whatever that package raises.
        """
        if name in self.builtin:
            return load_attribute(self.builtin[name])
        if name.startswith("python:"):
            return load_python(name, allow_code)
        entry = self._entry(name)
        if entry is None:
            raise UnknownNameError(self.kind, name, self.names())
        try:
            return entry.load()
        except (Exception, SystemExit) as error:
            why = raised_at(error, {_top(entry.value.partition(":")[0])})
            raise UsageError(
                f'{self.kind} "{name}" does not import: {why}; repair or uninstall the package that registers it as '
                f"{entry.value}"
            ) from error

    def packages(self, name: str, allow_code: Collection[str] = ()) -> set[str]:
        """The top-level packages of others that `name` comes from: where it is named and where it is defined.

        Empty for what ships with secateur, and for names that are no entry.
        """
        if name in self.builtin:
            return set()
        entry = self._entry(name)
        if not name.startswith("python:") and entry is None:
            return set()
        found = self.load(name, allow_code)
        named = entry.module if entry is not None else name.split(":")[1]
        return {_top(named), _top(getattr(found, "__module__", None) or named)} - {_OURS}

    def code_hash(self, name: str, allow_code: Collection[str] = ()) -> str | None:
        """SHA-256 of the code behind a name that does not ship with secateur: what a cached result depends on.

        Every `*.py` file of its top-level packages counts, by path inside the package and by content, as it is on
        the disk now; a module that is a single file counts alone. Other packages that these import do not count.
        None for what ships with secateur.
        """
        packages = self.packages(name, allow_code)
        if not packages:
            return None
        whole = hashlib.sha256()
        for package in sorted(packages):
            for inside, file in _files(package):
                content = hashlib.sha256(file.read_bytes()).hexdigest()
                whole.update(f"{inside}\0{content}\n".encode())
        return whole.hexdigest()

    def _entry(self, name: str) -> EntryPoint | None:
        return next((e for e in self.entries() if e.name == name), None)


def _top(module: str) -> str:
    return module.partition(".")[0]


def _files(package: str) -> Iterator[tuple[str, Path]]:
    """The source files of a package or module, with their paths inside it."""
    module = importlib.import_module(package)
    for root in map(Path, getattr(module, "__path__", ())):
        found = sorted(p for p in root.rglob("*.py") if p.is_file())
        yield from ((f"{package}/{p.relative_to(root).as_posix()}", p) for p in found)
    file = getattr(module, "__file__", None)
    if not hasattr(module, "__path__") and file is not None:
        yield package, Path(file)
