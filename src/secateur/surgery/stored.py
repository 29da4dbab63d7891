"""A stored answer: inputs made up alike on every machine, and what a network said to them when it was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError, UsageError
from secateur.surgery.verify import outputs_in_eval

__all__ = ["answers", "check_answers", "describe_inputs", "stored_inputs"]

_SAMPLES = 2
_ANSWERS = 4096
_AGREES = 1e-3


def describe_inputs(inputs: Tensor | tuple[Any, ...]) -> list[dict[str, Any]]:
    """Shape, type and range of each input, with two samples, as JSON data."""
    described = []
    for value in inputs if isinstance(inputs, tuple) else (inputs,):
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise UsageError(f"save_pruned: inputs must be tensors with a batch dimension, got {type(value).__name__}")
        kind = str(value.dtype).removeprefix("torch.")
        below = 0 if value.is_floating_point() else int(value.max()) + 1
        described.append({"shape": [_SAMPLES, *value.shape[1:]], "dtype": kind, "below": below})
    return described


def _made_up(number: int, spec: Mapping[str, Any]) -> Tensor:
    """An input that is the same on every machine: hashed positions, uniform with variance 1."""
    shape = [int(n) for n in spec["shape"]]
    x = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64((number + 1) << 40)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    dtype = getattr(torch, str(spec["dtype"]))
    if spec["below"]:
        return torch.from_numpy((x % np.uint64(spec["below"])).astype(np.int64)).reshape(shape).to(dtype)
    unit = (x >> np.uint64(11)).astype(np.float64) / 2.0**53
    return torch.from_numpy((2 * unit - 1) * 3**0.5).reshape(shape).to(dtype)


def stored_inputs(check: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    """The made-up inputs that `check` describes, on the CPU."""
    return tuple(_made_up(number, spec) for number, spec in enumerate(check))


def answers(model: nn.Module, check: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """Up to 4096 values of each output of `model` for the inputs `check` describes."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = tuple(x.to(device) for x in stored_inputs(check))
    found = []
    for tensor in outputs_in_eval(model, inputs):
        if tensor.is_floating_point():
            flat = tensor.reshape(-1)
            found.append(flat[:: max(1, -(-flat.numel() // _ANSWERS))].cpu().contiguous().clone())
    return found


def check_answers(what: str, model: nn.Module, check: Sequence[Mapping[str, Any]], stored: Sequence[Tensor]) -> None:
    """Raise `CheckpointError` unless `model` still answers what is `stored`."""
    if not check:
        return
    try:
        given = answers(model, check)
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{what}: the rebuilt network does not run ({line})") from error
    for expected, got in zip(stored, given, strict=False):
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        difference = float((expected.double() - got.double()).abs().max()) if expected.shape == got.shape else np.inf
        coarse = torch.finfo(expected.dtype).eps > 1e-5
        if not difference <= (0.05 if coarse else _AGREES) * scale:
            raise CheckpointError(
                f"{what}: the rebuilt network answers the stored input off by {difference:.3g} (scale {scale:.3g}); "
                "its tensors were altered, or its library computes something else here"
            )
    if len(stored) != len(given):
        raise CheckpointError(f"{what}: {len(stored)} stored answers for {len(given)} outputs; the file was altered")
