"""Function modes that an attachment starts before a forward pass and stops after it, whatever happens in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

__all__ = ["Watch", "can_watch", "is_look", "property_of"]

# They tell what a tensor is like, not what is in it.
_PROPERTIES = frozenset(
    [
        *("shape", "ndim", "dtype", "itemsize", "nbytes", "device", "layout", "names", "requires_grad", "is_leaf"),
        *("is_cpu", "is_cuda", "is_mps", "is_xpu", "is_meta", "is_sparse", "is_nested", "is_quantized", "is_mkldnn"),
        *("output_nr", "_version", "_backward_hooks", "grad"),
    ]
)
_METHODS = frozenset(
    [
        *("size", "dim", "ndimension", "stride", "numel", "nelement", "element_size", "storage_offset", "get_device"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "is_same_size", "__len__", "__hash__"),
        *("register_hook", "retain_grad"),
    ]
)


class Watch(TorchFunctionMode):
    """A function mode with `start` and `stop`, which may be called at any time, also twice."""

    def start(self) -> None:
        if self not in _get_current_function_mode_stack():
            _push_mode(self)

    def stop(self) -> None:
        """Take it from the stack of modes, where others may have been left above it."""
        above = []
        while self in _get_current_function_mode_stack():
            above.append(_pop_mode())
        for mode in reversed(above[:-1]):
            _push_mode(mode)


def can_watch(model: nn.Module) -> bool:
    """Whether modes see all that `model` does: in this thread, uncompiled."""
    if torch.compiler.is_compiling() or isinstance(model, nn.DataParallel):
        return False
    return not any(
        isinstance(m, torch.jit.ScriptModule) or "_orig_mod" in m._modules or m._compiled_call_impl is not None
        for m in model.modules()
    )


def property_of(func: Callable[..., Any]) -> str | None:
    """The tensor's property that a function reads, if it does."""
    if getattr(func, "__name__", "") != "__get__":
        return None
    name: str | None = getattr(getattr(func, "__self__", None), "__name__", None)
    return name


def is_look(func: Callable[..., Any]) -> bool:
    """Whether a function only looks at what its tensors are like."""
    return property_of(func) in _PROPERTIES or getattr(func, "__name__", "") in _METHODS
