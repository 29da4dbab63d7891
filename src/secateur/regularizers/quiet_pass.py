"""A forward pass that only looks: modes and torch's generators are as before after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["quiet_pass", "tensors_in"]


@contextmanager
def quiet_pass(network: nn.Module) -> Iterator[None]:
    """Within the block: eval mode, no gradients; modes and torch's generators are put back afterwards."""
    flags = [(m, m.training) for m in network.modules()]
    devices = {p.device.index for p in network.parameters() if p.device.type == "cuda"}
    # The fused path of transformer layers calls no submodules.
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        for module, _ in flags:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch.random.fork_rng(devices=[d for d in devices if d is not None]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, was_training in flags:
            module.training = was_training


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Every tensor in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))
