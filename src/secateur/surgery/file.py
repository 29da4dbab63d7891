"""A pruned network in one safetensors file that needs no original widths and runs no code of its own.

The metadata say how to build the dense network (on `meta`, so without memory for it) and what was cut; the
tensors are those of the pruned one. A stored answer to a fixed input shows that what is loaded is what was saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._version import __version__
from secateur.core.targets import unwrap
from secateur.errors import CheckpointError, SecateurError, StorageError, UsageError
from secateur.surgery.builders import build, check_arguments
from secateur.surgery.container import read_container
from secateur.surgery.cut import apply_plan
from secateur.surgery.header import FORMAT, PACKED_SCHEMA, SCHEMA, PrunedHeader, parse_header
from secateur.surgery.packed import pack_parameters, unpack_parameters
from secateur.surgery.plan import Plan, fingerprint
from secateur.surgery.stored import answers, check_answers, describe_inputs

__all__ = ["PrunedHeader", "load_pruned", "read_pruned_header", "save_pruned"]

_CHECK = "secateur.check."


def save_pruned(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    builder: str,
    kwargs: Mapping[str, Any],
    plan: Plan | Sequence[Plan],
    inputs: Tensor | tuple[Any, ...] | None = None,
    extra: Mapping[str, Any] | None = None,
    sparse: bool = False,
) -> Path:
    """Write the cut `model` so that `load_pruned` rebuilds it anywhere; returns the file's path.

    The file appears whole or not at all. Before writing, the network is rebuilt from `builder` and `plan` to
    see that they lead to this one.

    Args:
        path: the file, or an existing folder (then `model.safetensors` in it).
        model: the network after the cuts.
        builder, kwargs: `module:function` and JSON arguments that built the dense network.
        plan: the plan it was cut by, or all plans in order; an empty sequence for a network not cut.
        inputs: example inputs; the answer to fixed made-up inputs of these shapes is stored as a check.
        extra: anything JSON to keep along (sparsity, accuracy, recipe).
        sparse: store floating-point parameters that get smaller by it as one bit a weight and the weights that are
            not zero. Only the file is smaller: what is loaded from it is dense, bit by bit the same.

    Raises:
        UsageError: builder and plan do not lead to this network, or arguments are not JSON.
        StorageError: the disk is full, read-only or not writable.
    """
    model = unwrap(model)
    plans = [plan] if isinstance(plan, Plan) else list(plan)
    _check_rebuild(model, builder, kwargs, plans)
    tensors, tied = _tensors(model)
    tensors, packed = pack_parameters(tensors, dict(model.named_parameters()) if sparse else ())
    check = [] if inputs is None else describe_inputs(inputs)
    if check:
        for number, answer in enumerate(answers(model, check)):
            tensors[f"{_CHECK}{number}"] = answer
    header = {
        "format": FORMAT,
        "schema": PACKED_SCHEMA if packed else SCHEMA,
        "builder": builder,
        "kwargs": dict(kwargs),
        "plans": [p.to_dict() for p in plans],
        "fingerprint": fingerprint(model),
        "digest": _digest(tensors),
        "tied": tied,
        "check": check,
        "extra": dict(extra or {}),
        "versions": {"secateur": __version__, "torch": torch.__version__, "python": platform.python_version()},
        **({"packed": packed} if packed else {}),
    }
    try:
        text = json.dumps(header, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise UsageError(f"save_pruned: kwargs and extra must be plain JSON values ({error})") from error
    from safetensors.torch import save

    target = Path(path)
    if target.is_dir():
        target = target / "model.safetensors"
    _write(target, save(tensors, metadata={"format": "pt", "secateur": text}))
    return target


def read_pruned_header(path: str | os.PathLike[str]) -> PrunedHeader:
    """What the file says about itself. Raises `CheckpointError` where it is not a pruned-model file."""
    return parse_header(_file(path), read_container(_file(path)))


def load_pruned(
    path: str | os.PathLike[str], *, device: str | torch.device = "cpu", allow_code: Collection[str] = ()
) -> nn.Module:
    """Rebuild a network that `save_pruned` wrote, in eval mode.

    Runs no code from the file: builders of secateur, torchvision and timm are known; any other must be in a
    module that the caller names in `allow_code`. Nothing is unpickled or downloaded.

    Raises:
        CheckpointError: the file is missing, truncated, foreign, unsafe, or does not give the network it says.
        UsageError: its builder is not allowed.

    Cost: no memory for the dense network where its builder works on the `meta` device.
    """
    file = _file(path)
    header = parse_header(file, read_container(file))
    model = build(header.builder, header.kwargs, allow_code)
    try:
        for plan in header.plans:
            apply_plan(model, plan)
    except (SecateurError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{file}: its plan does not fit what {header.builder} builds here ({error}); is another version of "
            "that library installed?"
        ) from error
    tensors = _read_tensors(file)
    digest = _digest(tensors)
    try:
        tensors = unpack_parameters(tensors, header.packed, {n: p.shape for n, p in model.named_parameters()})
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}; the file was altered or damaged, copy it again") from None
    stored = [tensors.pop(f"{_CHECK}{i}") for i in range(len(tensors)) if f"{_CHECK}{i}" in tensors]
    _fill(file, model, tensors, header)
    model.to(device).eval()
    check_answers(str(file), model, header.check, stored)
    # Last, because what is wrong in particular says more than that something is.
    if digest != header.digest:
        raise CheckpointError(
            f"{file}: its tensors are not those that were saved; it was altered or damaged, copy it again"
        )
    return model


def _file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_dir():
        return file
    if not (file / "model.safetensors").is_file():
        raise CheckpointError(f"{file}: a folder without model.safetensors; name the file, as the run's report does")
    return file / "model.safetensors"


def _check_rebuild(model: nn.Module, builder: str, kwargs: Mapping[str, Any], plans: Sequence[Plan]) -> None:
    check_arguments(kwargs)
    # The caller names the builder of a network in hand, so its module is trusted here.
    again = build(builder, kwargs, allow_code=[builder.partition(":")[0]])
    try:
        for plan in plans:
            apply_plan(again, plan)
    except SecateurError as error:
        raise UsageError(f"save_pruned: {builder} does not build the network that was cut: {error}") from error
    if fingerprint(again) != fingerprint(model):
        raise UsageError(
            f"save_pruned: {builder} and {len(plans)} plan(s) do not lead to this {type(model).__name__}; give the "
            "arguments it was built with and every plan it was cut by, in order"
        )


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every parameter and buffer once (those out of `state_dict` too: a network built on meta lacks them)."""
    state = model.state_dict()
    other = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if other:
        raise UsageError(f'save_pruned: "{other[0]}" of the state is no tensor; remove it before saving')
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        # safetensors refuses tensors that share memory; views of one buffer are stored each on its own.
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, tied


def _fill(file: Path, model: nn.Module, tensors: dict[str, Tensor], header: PrunedHeader) -> None:
    """Put the stored tensors into the rebuilt network, tie what was tied, and leave nothing on `meta`."""
    try:
        everything = {**tensors, **{alias: tensors[name] for alias, name in header.tied.items()}}
    except KeyError as error:
        raise CheckpointError(f"{file}: the tensor {error} is missing; copy the file again") from None
    persistent = set(model.state_dict())
    try:
        buffers = {name: everything.pop(name) for name, _ in model.named_buffers() if name not in persistent}
        model.load_state_dict(everything, strict=True, assign=True)
    except (KeyError, RuntimeError) as error:
        line = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file}: tensors do not fit the network it describes: {line}") from None
    for name, buffer in buffers.items():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer
    for alias, name in header.tied.items():
        source_owner, _, source = name.rpartition(".")
        owner, _, attribute = alias.rpartition(".")
        tensor = getattr(model.get_submodule(source_owner), source)
        slots = model.get_submodule(owner)
        (slots._parameters if isinstance(tensor, nn.Parameter) else slots._buffers)[attribute] = tensor
    if fingerprint(model) != header.fingerprint:
        raise CheckpointError(f"{file}: the rebuilt network is not the one saved; the file has been altered")


def _read_tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}); copy it again") from None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(target: Path, content: bytes) -> None:
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # A temporary file is private; the network is as readable as any file its owner makes.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}; free space or choose another folder"
        ) from error
