"""The one place that knows the training engine (Lightning Fabric): device, precision, backward."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import MissingExtraError, UsageError

__all__ = ["Runtime"]

Precision = Literal["32-true", "bf16-mixed"]


class Runtime:
    """Where and how a network runs. One process; the seam where several would come in.

    Args:
        device: `"auto"`, `"cpu"`, `"cuda"` or `"cuda:N"`.
        precision: `"32-true"` or `"bf16-mixed"` (autocast), Fabric's names.
    """

    def __init__(self, device: str = "auto", precision: Precision = "32-true") -> None:
        accelerator, devices = _accelerator(device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from lightning_fabric import Fabric

            self._fabric = Fabric(accelerator=accelerator, devices=devices, precision=precision)
        self.device: torch.device = self._fabric.device

    def setup(self, model: nn.Module, optimizer: Optimizer | None = None) -> tuple[Any, Any]:
        """The model (and optimizer) as the engine runs them, on this device."""
        if optimizer is None:
            return self._fabric.setup_module(model), None
        return self._fabric.setup(model, optimizer)

    def backward(self, loss: Tensor) -> None:
        self._fabric.backward(loss)

    def clip(self, model: Any, optimizer: Any, norm: float) -> None:
        """Scale the whole gradient down to a norm of at most `norm`."""
        self._fabric.clip_gradients(model, optimizer, max_norm=norm, error_if_nonfinite=False)

    def to_device(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.to(self.device, non_blocking=True) for t in tensors)

    @contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Eval mode without gradients, in this precision; the mode is put back."""
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), self._fabric.autocast():
                yield
        finally:
            model.train(was_training)


def _accelerator(device: str) -> tuple[str, Any]:
    kind, _, index = device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cpu" and not index:
        return "cpu", 1
    if kind == "cuda" and (index.isdecimal() or not index):
        if not torch.cuda.is_available():
            raise _NoDevice(f'device "{device}" is not available here; use --device cpu')
        return "cuda", [int(index)] if index else 1
    raise UsageError(f'device "{device}": expected auto, cpu, cuda or cuda:N')


class _NoDevice(MissingExtraError):
    def __init__(self, message: str) -> None:
        Exception.__init__(self, message)
