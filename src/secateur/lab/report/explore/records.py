"""The records that a section's result is made of, as CSV: one file a list, one row a record, for whoever counts on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from secateur.lab.report.tables import csv_of

__all__ = ["record_files"]


def record_files(section: Mapping[str, Any], name: str) -> tuple[tuple[str, str], ...]:
    """(File name, content) of every list of records in a section: its cells, trials, rates, networks, layers, ...

    Columns are named by the path of a value: `difference.low`, `accuracies.3`. Records within records (a layer's steps)
    have a file of their own, each row with what names the record they are in. A matrix is a file too. Numbers are
    written as exactly as they are stored.

    Args:
        name: what file names begin with; parts of a name are set apart by dots.
    """
    files: list[tuple[str, str]] = []
    for key, found in section.items():
        if key == "parts":
            # Each is a result of its own kind.
            files += (file for part in found for file in record_files(part, f"{name}.{part['what']}"))
        elif key != "spec":
            files += _files(found, f"{name}.{key}")
    return tuple(files)


def _files(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """A table, and those of the records inside it."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _files(entry, f"{name}.{key}")
    elif _is_records(value):
        inner = list(dict.fromkeys(key for record in value for key, entry in record.items() if _is_records(entry)))
        yield _table(name, [dict(_columns({k: v for k, v in r.items() if k not in inner}, "")) for r in value])
        for key in inner:
            rows = [{**_names(record), **dict(_columns(e, f"{key}."))} for record in value for e in record.get(key, ())]
            yield _table(f"{name}.{key}", rows)
    elif _is_matrix(value):
        yield _table(name, [{str(number): cell for number, cell in enumerate(row)} for row in value])


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    head = list(dict.fromkeys(column for row in rows for column in row))
    # The shortest text that gives the very number again.
    lines = [[repr(cell) if isinstance(cell, float) else cell for cell in map(row.get, head)] for row in rows]
    return f"{name}.csv", csv_of(head, lines)


def _names(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not isinstance(value, list | dict)}


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


def _is_matrix(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, list) and row for row in value)


def _columns(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _columns(entry, f"{path}{key}.")
    elif isinstance(value, list) and not any(isinstance(entry, list | dict) for entry in value):
        for number, entry in enumerate(value):
            yield f"{path}{number}", entry
    else:
        yield path.removesuffix("."), json.dumps(value) if isinstance(value, list) else value
