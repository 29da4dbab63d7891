"""One network by its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.lab.report.explore.delivered import delivered_lines, delivered_table
from secateur.lab.report.explore.view import View
from secateur.lab.report.words import many, percent

__all__ = ["view"]


def view(section: Mapping[str, Any], name: str) -> View:
    """What a deliver section made."""
    numbers = ", ".join(f"{key} {value:g}" for key, value in section["numbers"].items())
    accuracy = percent(section["values"]["accuracy"])
    first = f"With {numbers}: {accuracy} on the {many(section['judged'], 'image')} judged by."
    return View(
        title=section["title"],
        lines=(first, *delivered_lines(section["delivered"], section["stage"])),
        tables=(delivered_table(section["delivered"]),),
    )
