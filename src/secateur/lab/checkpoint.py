"""Checkpoints without pickle: one safetensors file, plain values in its JSON metadata, replaced atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import CheckpointError, StorageError

__all__ = ["fitting", "load_tensors", "optimizer_state", "restore_optimizer", "save_tensors", "write_atomically"]

_FORMAT = "secateur-checkpoint"
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Write tensors and JSON values to `path`; the old file stays whole until the new one is complete."""
    flat = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    # One entry, because safetensors writes several in any order and equal states should give equal files.
    write_atomically(path, save(flat, {_FORMAT: json.dumps(values)}))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside `path` and rename it there; `StorageError` if the disk is full or read-only."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another --out"
        ) from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote. `CheckpointError` for truncated, foreign or pickled files; never unpickles."""
    try:
        with path.open("rb") as stream:
            head = stream.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}; {_remedy(path)}") from error
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if _FORMAT not in metadata:
                raise CheckpointError(f"{path}: a safetensors file, but not a secateur checkpoint; {_remedy(path)}")
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(metadata[_FORMAT])  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        # Safetensors begins with a length, which may look like any of these, and then always has "{".
        if head[8:] != b"{" and head[:2] in _PICKLES:
            raise CheckpointError(
                f"{path}: this is a pickle (torch.save), which can run code when loaded; expected a "
                f"safetensors file; {_remedy(path)}"
            ) from error
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error}); {_remedy(path)}") from error


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Around putting what `path` held into a network: `CheckpointError` where it belongs to another one."""
    try:
        yield
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: belongs to another network or training ({line}); {_remedy(path)}") from error


def _remedy(path: Path) -> str:
    """What to delete: beside a result, the stage counts as done, and without the file it could not go on."""
    result = path.with_name("result.json")
    if result.is_file():
        return f"delete {result} to redo that stage"
    return "delete it to start over"


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state by parameter name: tensors, and plain values."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{key}"] = value
            else:
                values[f"{name}|{key}"] = value
    return tensors, values


def restore_optimizer(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Put back what `optimizer_state` returned, by name."""
    parameters = dict(model.named_parameters())
    for name, value in {**tensors, **values}.items():
        owner, _, key = name.rpartition("|")
        if owner not in parameters:
            raise CheckpointError(f'optimizer state for "{owner}", which the network does not have')
        parameter = parameters[owner]
        if isinstance(value, Tensor):
            if value.dim() and value.shape != parameter.shape:
                raise CheckpointError(
                    f'optimizer state "{key}" of "{owner}" has shape {list(value.shape)}, '
                    f"expected {list(parameter.shape)}"
                )
            # Adam keeps its step counter on the CPU; moments live with their parameter.
            value = value.to(parameter.device) if value.dim() else value.clone()
        optimizer.state[parameter][key] = value


def global_rng() -> dict[str, Tensor]:
    """The state of torch's global generators, which noise inside a network's forward pass draws from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_global_rng(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda0" in state:
        torch.cuda.set_rng_state_all([state[f"cuda{i}"] for i in range(len(state) - 1)])
