"""Inputs of any nesting of tensors: passed to a network, moved to its device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["call", "moved", "tensors"]


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
