"""How much memory one forward pass needs at its worst moment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from secateur.analysis.inputs import Inputs, as_args, evaluating
from secateur.core.targets import unwrap
from secateur.errors import UsageError

__all__ = ["MemoryUse", "peak_memory"]


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one forward pass in bytes; `total_bytes` is what must fit.

    Args:
        weights_bytes: parameters and buffers, tied tensors once.
        peak_bytes: most memory allocated at one time by the forward pass itself: activations, outputs and
            kernels' working space, on top of the weights and the input.
        device: "cpu" or the accelerator's name.
    """

    weights_bytes: int
    peak_bytes: int
    device: str

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.peak_bytes


def peak_memory(model: nn.Module, example_input: Inputs) -> MemoryUse:
    """Peak memory of one eval forward pass on `example_input` as it is (its batch size counts).

    On the CPU: the highest running sum over the allocations and frees torch's allocator reports to the
    profiler, hence the same number every time; what oneDNN and other libraries allocate on their own is not
    seen. On CUDA: `torch.cuda.max_memory_allocated`, which rounds blocks up to 512 bytes; resets its peak.

    Cost:
        Two forward passes; the first fills caches that would otherwise be counted.

    Raises:
        UsageError: the model is on `meta` or on an accelerator that is not CUDA.
    """
    model = unwrap(model)
    args = as_args(example_input)
    tensors = [*model.parameters(), *model.buffers(), *(a for a in args if isinstance(a, torch.Tensor))]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"peak memory cannot be measured on {device.type}; expected a model on cpu or cuda")
    with evaluating(model), torch.inference_mode():
        model(*args)
        peak = _peak_cuda(model, args, device) if device.type == "cuda" else _peak_cpu(model, args)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return MemoryUse(_weights_bytes(model), peak, name)


def _peak_cpu(model: nn.Module, args: tuple[Any, ...]) -> int:
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = model(*args)
    del output
    records = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    ]
    # Python's sort is stable: records of one nanosecond stay in the order they were made.
    records.sort(key=lambda record: record[0])
    live = peak = 0
    for _, size in records:
        live += size
        peak = max(peak, live)
    return peak


def _peak_cuda(model: nn.Module, args: tuple[Any, ...], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    output = model(*args)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del output
    return peak


def _weights_bytes(model: nn.Module) -> int:
    seen = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return sum(seen.values())


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler's native log lines (start, stop, no device found) off stderr."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "6")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
