"""What a pruned-model file says about itself, and the check that it may be believed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError, SecateurError
from secateur.surgery.plan import Plan

__all__ = ["FORMAT", "PACKED_SCHEMA", "SCHEMA", "PrunedHeader", "parse_header"]

FORMAT = "secateur-pruned"
SCHEMA = 1
# Of files with packed tensors, so that versions that know none refuse them by their schema.
PACKED_SCHEMA = 2


@dataclass(frozen=True)
class PrunedHeader:
    """What a pruned-model file says about itself, read without its tensors.

    Args:
        builder: `"module:function"` that builds the dense network.
        kwargs: its arguments.
        plans: the cuts, in order.
        fingerprint: of the pruned network.
        digest: SHA-256 of all tensors in the file, as they are stored.
        tied: alias -> name under which the tensor is stored.
        check: shapes, types and ranges of the inputs whose answer is stored; empty if none is.
        extra: what the caller added.
        versions: of secateur, torch and Python that wrote it.
        packed: shapes of the parameters that are stored as bits and kept values.
    """

    builder: str
    kwargs: dict[str, Any]
    plans: tuple[Plan, ...]
    fingerprint: str
    digest: str
    tied: dict[str, str]
    check: tuple[dict[str, Any], ...]
    extra: dict[str, Any]
    versions: dict[str, str]
    packed: dict[str, list[int]]


def parse_header(file: Path, metadata: Mapping[str, str]) -> PrunedHeader:
    """The header in a file's metadata; `CheckpointError` for anything else."""
    if "secateur" not in metadata:
        raise CheckpointError(
            f"{file}: a safetensors file, but not a pruned network of secateur; expected one written by save_pruned"
        )
    try:
        header = json.loads(metadata["secateur"])
        if header["format"] != FORMAT or header["schema"] not in (SCHEMA, PACKED_SCHEMA):
            raise CheckpointError(
                f"{file}: format {header['format']!r} schema {header['schema']!r}, expected {FORMAT!r} {SCHEMA} or "
                f"{PACKED_SCHEMA}; it was written by another version of secateur"
            )
        return PrunedHeader(
            builder=str(header["builder"]),
            kwargs=dict(header["kwargs"]),
            plans=tuple(Plan.from_dict(plan) for plan in header["plans"]),
            fingerprint=str(header["fingerprint"]),
            digest=str(header["digest"]),
            tied={str(k): str(v) for k, v in header["tied"].items()},
            check=tuple(dict(c) for c in header["check"]),
            extra=dict(header["extra"]),
            versions=dict(header["versions"]),
            packed={} if header["schema"] == SCHEMA else {k: list(v) for k, v in header["packed"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, SecateurError):
            raise
        raise CheckpointError(f"{file}: its header is malformed ({type(error).__name__}: {error})") from None
