"""What a model file is, from its first bytes: safetensors metadata, or one line that says what else it is."""

from __future__ import annotations

import json
from pathlib import Path

from secateur.errors import CheckpointError

__all__ = ["read_container"]

_LARGEST_HEADER = 100_000_000


def read_container(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; `CheckpointError` where it is anything else. Never unpickles."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(9)
            length = int.from_bytes(start[:8], "little")
            safetensors = start[8:] == b"{" and length <= _LARGEST_HEADER
            text = start[8:] + stream.read(length - 1) if safetensors else b""
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
    if not safetensors:
        raise CheckpointError(f"{file}: {_guess(start, size)}; expected a file that save_pruned wrote")
    if len(text) < length:
        raise CheckpointError(f"{file}: truncated ({size} bytes, its header alone takes {8 + length}); copy it again")
    try:
        header = json.loads(text)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        metadata = {str(k): str(v) for k, v in header.get("__metadata__", {}).items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise CheckpointError(f"{file}: its safetensors header is malformed; copy it again") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        what = "truncated" if size < expected else "has bytes to spare"
        raise CheckpointError(f"{file}: {what} ({size} bytes, expected {expected}); copy it again")
    return metadata


def _guess(start: bytes, size: int) -> str:
    if size == 0:
        return "empty"
    if start[:2] == b"PK":
        return "a zip archive, as torch.save writes (a pickle, which may run code and is never loaded)"
    if start[:1] == b"\x80":
        return "a pickle, which may run code and is never loaded"
    return "not a safetensors file"
