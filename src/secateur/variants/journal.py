"""A file that evaluations are continued from: one line for each variant and part of the data."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import CheckpointError
from secateur.variants.kinds import Variant

__all__ = ["Journal"]


class Journal:
    """Appends lines of JSON to a file and flushes each; a last line that was cut off is dropped.

    The first line says what all others depend on (network, data, score); a file that began with another is refused.

    Raises: `CheckpointError` for a file of another evaluation, or one that is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], basis: dict[str, Any]) -> None:
        self.path, self._basis = Path(path), basis
        self._known: dict[tuple[str, int], np.ndarray] = {}
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(basis)
            return
        whole = self._mend()
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._read(number, json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{self.path}:{number}: not a line of an evaluation ({error}); move the file away to start over"
                ) from error

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
        values = np.frombuffer(base64.b64decode(line["values"]), np.uint8)
        if line["dtype"] == "bool":
            found = np.unpackbits(values, count=int(line["count"])).astype(bool)
        else:
            found = values.view(np.float32)
        self._known[line["variant"], int(line["part"])] = found

    def get(self, variant: Variant, part: int) -> np.ndarray | None:
        """The values of a variant on a part of the data, if they are known."""
        return self._known.get((_key(variant), part))

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
        with self.path.open("ab") as file:
            file.write(json.dumps(line, sort_keys=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _key(variant: Variant) -> str:
    return json.dumps(variant.record(), sort_keys=True)
