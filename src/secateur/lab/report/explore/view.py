"""What one section of an exploration shows."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.lab.report.picture import Picture
from secateur.lab.report.tables import Table

__all__ = ["View"]


@dataclass(frozen=True)
class View:
    """One section on the page.

    Args:
        title: its heading.
        lines: what it found, in sentences, the most important first; the terminal prints them too.
        pictures, tables: in the order they appear.
        notes: how the numbers were made, in small print.
        files: name and content of each CSV file that lies beside the page.
    """

    title: str
    lines: tuple[str, ...]
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
