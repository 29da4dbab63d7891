"""Weights trained elsewhere into a network built here, without running what is in the file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.errors import CheckpointError

__all__ = ["load_weights"]

# Where training programs put the state of a network among other things, and what wrappers put before its names.
_INSIDE = ("state_dict", "model_state_dict", "model", "net", "weights")
_PREFIXES = ("module.", "_orig_mod.", "model.")


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy the parameters and buffers in a file into `model`, all of them.

    Args:
        model: built as the one the file was saved from.
        path: `.safetensors`, or a file of `torch.save` that holds tensors only (it is read without running code). A
            mapping with the state under a usual name (`"state_dict"`, ...) is looked into, and a prefix that all names
            bear (`"module."`, ...) is left out.

    Raises: `CheckpointError` for a file that is missing, is no such file, or does not fit: then nothing is changed.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; expected weights, .safetensors or saved by torch.save")
    own = model.state_dict()
    state = _without_prefix(_tensors(file, _read(file)), own)
    # Files from before 2018 do not have this count, which only an average over all batches needs.
    state = {**{n: t for n, t in own.items() if n.endswith("num_batches_tracked")}, **state}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        said = [
            f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            for what, names in (("it lacks", missing), ("it has besides", unexpected))
            if names
        ]
        if any(name.startswith("secateur.") for name in unexpected):
            raise CheckpointError(
                f"{file}: the file of a pruned network (load_pruned); expected weights of a whole one"
            )
        raise CheckpointError(f"{file}: not the weights of this {type(model).__name__}: {'; '.join(said)}")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            raise CheckpointError(
                f'{file}: "{name}" has shape {list(state[name].shape)}, the network\'s has {list(tensor.shape)}; build '
                "the network with the widths and classes it was trained with"
            )
    model.load_state_dict(state, strict=True)


def _read(file: Path) -> Any:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file}: cannot be read as weights ({what}); expected .safetensors, or torch.save of a state_dict"
        ) from error


def _tensors(file: Path, found: Any) -> dict[str, Tensor]:
    for _ in range(2):
        if isinstance(found, Mapping) and found and all(isinstance(v, Tensor) for v in found.values()):
            return {str(name): tensor for name, tensor in found.items()}
        inside = [key for key in _INSIDE if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)]
        if not inside:
            break
        found = found[inside[0]]
    holds = ", ".join(map(str, list(found)[:5])) if isinstance(found, Mapping) else type(found).__name__
    raise CheckpointError(f"{file}: holds no state_dict, but {holds}; expected names and tensors")


def _without_prefix(state: dict[str, Tensor], own: Mapping[str, Any]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if state.keys() != own.keys() and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state
