"""BatchNorm statistics of chosen images, in place of those that training left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from secateur.criteria.gathering.batches import labelled
from secateur.variants.inputs import call, moved

__all__ = ["renew_statistics_", "renewed_statistics"]


@torch.no_grad()
def renew_statistics_(model: nn.Module, batches: Iterable[Any]) -> int:
    """Give every BatchNorm that keeps running statistics the plain averages over `batches`; returns the examples read.

    Modes are as before afterwards. Dropout and the like are in eval mode meanwhile: they would be noise in the
    statistics.
    """
    norms = _norms(model)
    if not norms:
        return 0
    training = {module: module.training for module in model.modules()}
    momenta = [norm.momentum for norm in norms]
    device, examples = next(model.parameters()).device, 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        for inputs, _, count in labelled(batches, task="recalibration"):
            call(model, moved(inputs, device))
            examples += count
    finally:
        for module, mode in training.items():
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return examples


@contextmanager
def renewed_statistics(model: nn.Module, batches: Iterable[Any] | None) -> Iterator[int]:
    """The same within the block; how many examples it took. With None nothing changes."""
    if batches is None:
        yield 0
        return
    before = [(norm, {n: b.clone() for n, b in norm.named_buffers()}) for norm in _norms(model)]
    try:
        yield renew_statistics_(model, batches)
    finally:
        for norm, buffers in before:
            for name, value in buffers.items():
                getattr(norm, name).copy_(value)


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
