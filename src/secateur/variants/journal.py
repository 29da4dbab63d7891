"""A file that evaluations are continued from: one line for each variant and part of the data."""

from __future__ import annotations

import base64
import json
import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import CheckpointError, StorageError
from secateur.variants.kinds import Variant

__all__ = ["Journal"]


class Journal:
    """Appends lines of JSON to a file and flushes each; a last line that was cut off is dropped.

    The first line says what all others depend on (network, data, score); a file that began with another is refused.

    Raises: `CheckpointError` for a file of another evaluation, or one that is damaged; `StorageError` for one that
        cannot be read or written.
    """

    def __init__(self, path: str | os.PathLike[str], basis: dict[str, Any]) -> None:
        self.path, self._basis = Path(path), basis
        self._known: dict[tuple[str, int], tuple[int, np.ndarray]] = {}
        with self._stored():
            if not self.path.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._append(basis)
                return
            whole = self._mend()
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._read(number, _fields(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                raise self._damaged(number, error) from error

    def _mend(self) -> str:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            # The process was stopped in the middle of a line.
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        if not whole:
            self._append(self._basis)
        return whole.decode("utf-8", "replace")

    def _read(self, number: int, line: dict[str, Any]) -> None:
        if number == 1:
            if line != self._basis:
                differing = sorted(k for k in line.keys() | self._basis.keys() if line.get(k) != self._basis.get(k))
                raise CheckpointError(
                    f"{self.path}: the evaluation in it differs in {', '.join(differing)}; use another file"
                )
            return
        values = np.frombuffer(base64.b64decode(line["values"], validate=True), np.uint8)
        count = operator.index(line["count"])
        if line["dtype"] not in ("bool", "float32"):
            raise ValueError(f"dtype {line['dtype']!r}; expected bool or float32")
        packed = line["dtype"] == "bool"
        if count < 1 or values.size != (-(-count // 8) if packed else 4 * count):
            raise ValueError(f"count {count}, but {values.size} bytes of {line['dtype']} values")
        found = np.unpackbits(values, count=count).astype(bool) if packed else values.view(np.float32)
        self._known[line["variant"], operator.index(line["part"])] = number, found

    def get(self, variant: Variant, part: int, count: int) -> np.ndarray | None:
        """The values of a variant on a part of the data, if they are known.

        Raises: `CheckpointError` if they are not `count`, the examples of the part.
        """
        number, found = self._known.get((_key(variant), part), (0, None))
        if found is not None and len(found) != count:
            # Bits come eight to a byte, so that the line alone does not show every wrong count.
            raise self._damaged(number, f"count {len(found)}, but its part of the data has {count} examples")
        return found

    def put(self, variant: Variant, part: int, values: np.ndarray) -> None:
        """Write them down."""
        packed = np.packbits(values) if values.dtype == bool else values.astype(np.float32).view(np.uint8)
        self._append(
            {
                "variant": _key(variant),
                "part": part,
                "count": int(values.size),
                "dtype": "bool" if values.dtype == bool else "float32",
                "values": base64.b64encode(packed.tobytes()).decode("ascii"),
            }
        )

    def _append(self, line: dict[str, Any]) -> None:
        with self._stored(), self.path.open("ab") as file:
            file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _stored(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"journal: cannot read or write {self.path}: {error.strerror or error}; choose a writable file"
            ) from error

    def _damaged(self, number: int, reason: object) -> CheckpointError:
        return CheckpointError(
            f"{self.path}:{number}: not a line of an evaluation ({reason}); move the file away to start over"
        )


def _fields(line: Any) -> dict[str, Any]:
    if not isinstance(line, dict):
        raise TypeError(f"expected an object, got {type(line).__name__}")
    return line


def _key(variant: Variant) -> str:
    return json.dumps(variant.record(), sort_keys=True)
