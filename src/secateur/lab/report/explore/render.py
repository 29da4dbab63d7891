"""The page of an exploration: report.html that needs nothing else, with its plots beside it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError
from secateur.lab.report.explore.records import record_files
from secateur.lab.report.explore.view import View
from secateur.lab.report.page import origin, page, replace_file, slug, writable
from secateur.lab.report.words import many, percent

__all__ = ["exploration_lines", "views", "write_exploration"]


def views(result: Mapping[str, Any]) -> list[View]:
    """A view of each section.

    Raises: `CheckpointError` for a result that lacks what a section shows.
    """
    found: list[View] = []
    for section in _sections(result):
        name, taken = slug(section["title"]), [slug(shown.title) for shown in found]
        # Titles that differ may still have files of one name.
        name += f"-{taken.count(name) + 1}" if name in taken else ""
        try:
            module = importlib.import_module(f"secateur.lab.report.explore.{section['kind']}")
            found.append(replace(module.view(section, name), files=record_files(section, name)))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, ModuleNotFoundError) as error:
            raise CheckpointError(
                f'section "{section.get("title")}" of the result cannot be read ({type(error).__name__}: {error}); run '
                "the recipe again"
            ) from error
    return found


def write_exploration(result: Mapping[str, Any], out_dir: Path | str) -> Path:
    """Write report.html, every plot as SVG and PNG and every list of records as CSV; return report.html's path.

    Raises:
        CheckpointError: a result that is malformed.
        StorageError: the folder cannot be written.
    """
    shown, folder = views(result), writable(Path(out_dir))
    for picture in (picture for view in shown for picture in view.pictures):
        replace_file(folder / f"{picture.name}.svg", picture.svg.encode())
        replace_file(folder / f"{picture.name}.png", picture.png)
    for name, content in (file for view in shown for file in view.files):
        replace_file(folder / name, content.encode())
    recipe = result.get("recipe")
    run = {
        "network": _network(result),
        "description": (recipe or {}).get("description", ""),
        "views": shown,
        **origin(
            result.get("provenance"),
            recipe,
            created=result.get("created"),
            wall_seconds=result.get("wall_seconds"),
            recipe_hash=result.get("recipe_hash"),
            numbers="All numbers are in <code>result.json</code> of the run.",
        ),
    }
    text = page("exploration.html", str(result.get("name")), run=run)
    replace_file(folder / "report.html", text.encode("utf-8", "replace"))
    return folder / "report.html"


def exploration_lines(result: Mapping[str, Any]) -> list[str]:
    """The short text for a terminal."""
    lines = [_network(result)]
    for view in views(result):
        lines += ["", view.title, *(f"  {line}" for line in view.lines)]
    return lines


def _sections(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    sections = result.get("sections")
    if not isinstance(sections, list) or not all(
        isinstance(s, dict) and "kind" in s and "title" in s for s in sections
    ):
        raise CheckpointError("sections: expected a list of sections, each with kind and title; run the recipe again")
    return sections


def _network(result: Mapping[str, Any]) -> str:
    try:
        network = result["network"]
        origin = "trained here" if network["weights"] is None else f"weights from {Path(network['weights']).name}"
        return (
            f"{network['model']} ({origin}): {percent(network['held_right'] / network['held_images'])} of "
            f"{many(network['held_images'], 'test image')} held back. Variants are judged by "
            f"{many(network['judged_images'], 'other image')}."
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"network: {error} is missing or malformed; run the recipe again") from error
