"""The records that a section's result is made of, as CSV: one file a list, one row a record, for whoever counts on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from secateur.lab.report.tables import csv_of

__all__ = ["record_files"]


def record_files(section: Mapping[str, Any], name: str) -> tuple[tuple[str, str], ...]:
    """(File name, content) of every list of records in a section: its cells, trials, rates, networks, layers, ...

    Columns are named by the path of a value: `difference.low`, `accuracies.3`. A record that holds one list of records
    itself (a layer its steps) gives a row for each of these. Lists that columns cannot hold are JSON.
    """
    files: list[tuple[str, str]] = []
    for key, found in section.items():
        if key == "parts":
            # Each is a result of its own kind.
            files += (file for part in found for file in record_files(part, f"{name}-{part['what']}"))
        elif key != "spec" and _is_records(found):
            rows = [row for record in found for row in _rows(record)]
            head = list(dict.fromkeys(column for row in rows for column in row))
            files.append((f"{name}-{key}.csv", csv_of(head, ([row.get(column) for column in head] for row in rows))))
    return tuple(files)


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


def _rows(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    inner = [key for key, value in record.items() if _is_records(value)]
    if len(inner) != 1:
        yield dict(_columns(record, ""))
        return
    shared = dict(_columns({k: v for k, v in record.items() if k != inner[0]}, ""))
    for entry in record[inner[0]]:
        yield {**shared, **dict(_columns(entry, f"{inner[0]}."))}


def _columns(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _columns(entry, f"{path}{key}.")
    elif isinstance(value, Sequence) and not isinstance(value, str) and not any(_is_nested(v) for v in value):
        for number, entry in enumerate(value):
            yield f"{path}{number}", entry
    else:
        yield path.removesuffix("."), json.dumps(value) if _is_nested(value) else value


def _is_nested(value: Any) -> bool:
    return isinstance(value, list | tuple | dict)
