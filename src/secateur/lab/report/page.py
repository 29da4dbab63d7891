"""What every report page shares: templates, where a result came from, and files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from secateur.errors import StorageError
from secateur.lab.report.picture import COLORS
from secateur.lab.report.words import NOT_MEASURED

__all__ = ["origin", "page", "replace_file", "slug", "writable"]


def page(template: str, title: str, **values: Any) -> str:
    """A page that holds its styles, asks nothing of the network and runs no script."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = resources.files("secateur.lab.report")
    environment = Environment(
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(title=title, colors=COLORS, **values)


def origin(
    provenance: Mapping[str, Any] | None,
    recipe: Mapping[str, Any] | None,
    *,
    created: str | None,
    wall_seconds: float | None,
    recipe_hash: str | None,
    numbers: str,
) -> dict[str, Any]:
    """Where a result came from and how to repeat it, for the page.

    Args:
        numbers: a sentence, as HTML, that says where all numbers are.
    """
    known = dict(provenance or {})
    command, git = known.pop("command", None), known.pop("git", None)
    pairs = [
        ("created", created),
        ("wall time", None if wall_seconds is None else f"{wall_seconds:.1f} s"),
        ("recipe", recipe_hash),
    ]
    told = [(key, NOT_MEASURED if value is None else str(value)) for key, value in pairs]
    for key in dict.fromkeys(["versions", "device", "threads", "platform", *known]):
        value = known.get(key)
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        told.append((str(key), "not recorded" if value is None else str(value)))
    return {
        "provenance": told,
        "recipe": None if recipe is None else json.dumps(recipe, indent=2, default=str),
        "command": _command(command),
        "commit": _commit(git),
        "secateur": (known.get("versions") or {}).get("secateur"),
        "numbers": numbers,
    }


def _command(command: object) -> str | None:
    if isinstance(command, (list, tuple)):
        return shlex.join(str(part) for part in command)
    return None if command is None else str(command)


def _commit(git: object) -> str:
    if not isinstance(git, Mapping):
        return "not in a git repository, or not recorded"
    dirty = git.get("dirty")
    state = "" if dirty is None else " with uncommitted changes" if dirty else ", clean"
    return f"{git.get('commit')}{state}"


def slug(text: str) -> str:
    """Safe as a file name and as an id; never empty."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "run"


def writable(folder: Path) -> Path:
    """The folder, created where it is missing; `StorageError` if that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _storage(folder, error) from error
    return folder


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole: a full disk leaves the old one as it was."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _storage(path, error) from error


def _storage(path: Path, error: OSError) -> StorageError:
    return StorageError(f"report: cannot write {path}: {error.strerror or error}; choose a writable folder with space")
