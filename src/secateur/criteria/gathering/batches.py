"""Batches as scoring reads them, and a network that is left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import DataError, UsageError

__all__ = ["Batches", "Loss", "finite", "labelled", "read", "undisturbed"]

Batches = Iterable[Any]
Loss = Callable[[Any, Any], Tensor]


def read(batches: Batches, task: str = "scoring") -> Iterator[tuple[Any, Any, int]]:
    """(inputs, labels or None, samples) of every batch with samples; `DataError` naming `task` if there are none."""
    found = False
    for batch in batches:
        inputs, labels = batch if isinstance(batch, list | tuple) and len(batch) == 2 else (batch, None)
        count = _samples(inputs, labels, task)
        if count:
            found = True
            yield inputs, labels, count
    if not found:
        raise DataError(f"{task}: the batches are empty; expected at least one (inputs, labels)")


def labelled(batches: Batches, what: str = "gradients", task: str = "scoring") -> Iterator[tuple[Any, Any, int]]:
    """The same, with an error that names what needs labels when they are missing: criteria of `what`, else `task`."""
    for inputs, labels, count in read(batches, task):
        if labels is None:
            who = f"criteria that need {what} need labels" if task == "scoring" else f"{task}: batches need labels"
            raise UsageError(f"{who}: pass batches of (inputs, labels)")
        yield inputs, labels, count


def finite(value: Tensor, samples: int) -> Tensor:
    """`value`, a loss, if it is finite; `DataError` otherwise."""
    if not bool(torch.isfinite(value)):
        raise DataError(
            f"scoring: the loss is {float(value.detach())} after {samples} samples; expected a finite number"
        )
    return value


def _samples(inputs: Any, labels: Any, task: str) -> int:
    """Samples in a batch: the length of its labels, or of the first tensor in its inputs."""
    if isinstance(labels, Tensor) and labels.dim():
        return len(labels)
    while not isinstance(inputs, Tensor):
        values = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
        if not values:
            raise DataError(f"{task}: a batch holds no tensor; expected inputs, or (inputs, labels)")
        inputs = values[0]
    return len(inputs)


@contextmanager
def undisturbed(model: nn.Module, needing_grad: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Eval mode and gradients where needed; every flag put back afterwards."""
    training = [m for m in model.modules() if m.training]
    flags = {p: p.requires_grad for p in needing_grad}
    try:
        if training:
            model.eval()
        for parameter in flags:
            parameter.requires_grad_(True)
        yield
    finally:
        for module in training:
            module.training = True
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
