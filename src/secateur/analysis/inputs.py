"""Example inputs and eval mode: what every measurement needs, and must leave as it found it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError

__all__ = ["Inputs", "as_args", "batch_of", "evaluating", "with_batch"]

Inputs = Tensor | Sequence[Any]
"""What a network is called with: one tensor, or a tuple of positional arguments."""


def as_args(example_input: Inputs) -> tuple[Any, ...]:
    """`example_input` as positional arguments."""
    return (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)


def batch_of(args: Sequence[Any]) -> int:
    """Batch size: length of dimension 0 of the first tensor argument that has one.

    Raises:
        UsageError: there is no such tensor, or it is empty.
    """
    for value in args:
        if isinstance(value, Tensor) and value.ndim:
            if value.shape[0] == 0:
                break
            return value.shape[0]
    shapes = [tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in args]
    raise UsageError(f"example input {shapes} has no batch dimension; expected a tensor with at least one row")


def with_batch(args: Sequence[Any], batch_size: int) -> tuple[Any, ...]:
    """`args` with `batch_size` rows: the first rows, cycled when there are too few.

    Only tensors as long as the batch are touched; masks and tables that are not batched pass through.

    Examples:
        >>> with_batch([torch.tensor([[1.0], [2.0]])], 3)[0].flatten().tolist()
        [1.0, 2.0, 1.0]
    """
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size} is impossible; expected 1 or more")
    rows = batch_of(args)

    def resize(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != rows:
            return value
        if batch_size <= rows:
            return value[:batch_size]
        return value[torch.arange(batch_size, device=value.device) % rows]

    return tuple(resize(value) for value in args)


@contextmanager
def evaluating(*models: object) -> Iterator[None]:
    """Eval mode for every `nn.Module` given; each submodule gets its own training flag back afterwards.

    Flags are set one by one rather than through `.eval()`, because a module may override `train()` with side
    effects, and because a network with some frozen parts would not come back as it was.
    """
    flags = [(m, m.training) for model in models if isinstance(model, nn.Module) for m in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, was_training in flags:
            module.training = was_training
