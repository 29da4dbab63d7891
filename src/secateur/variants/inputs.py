"""Inputs of any nesting of tensors: passed to a network, moved to its device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria.gathering.batches import undisturbed

__all__ = ["call", "fitting_batch", "moved", "tensors"]

# Numbers of the largest activation that a processor's cache holds beside the weights, and examples at a time at most.
_IN_CACHE, _LARGEST = 400_000, 500


def call(model: nn.Module, inputs: Any) -> Any:
    """What the network says; a mapping is passed by name."""
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def moved(value: Any, device: torch.device) -> Any:
    """The same on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return type(value)(moved(item, device) for item in value) if isinstance(value, list | tuple) else value


@torch.no_grad()
def fitting_batch(model: nn.Module, inputs: Any) -> int:
    """How many examples to pass at a time: on a CPU as many as its cache holds, because main memory is slower.

    A ResNet on 32x32 images is evaluated twice as fast in batches of 25 as in batches of 100.

    Args:
        inputs: one example, with a batch dimension of 1, on the model's device.
    """
    if next(model.parameters()).device.type != "cpu":
        return _LARGEST
    largest = 1

    def look(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal largest
        largest = max([largest, *(t.numel() for t in tensors(output))])

    handles = [m.register_forward_hook(look) for m in model.modules()]
    try:
        with undisturbed(model):
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return max(1, min(_LARGEST, _IN_CACHE // largest))
