"""L2 norms of what each weight of a layer multiplies."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from secateur.core.targets import Target

__all__ = ["InputNorm"]

_CONV = ("stride", "padding", "dilation", "groups")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")


class InputNorm:
    """Norms of the columns of a layer's input, seen as one row per sample and position, in float64.

    A convolution is the matrix product that it stands for: one column for each input channel and kernel position,
    with padding as zeros. For a transposed convolution a column is an input channel at the positions that the kernel
    position sends into the output.

    Cost: one read of the layer's input, and one small sum for each kernel position.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._squares: Tensor | float = 0.0

    def update(self, call: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Add one call of `torch.nn.functional`'s function named `call`, made with these arguments."""
        value = args[0] if args else kwargs["input"]
        value = value.detach().double().square()
        if call == "linear":
            self._squares = self._squares + value.reshape(-1, value.shape[-1]).sum(0)[None]
            return
        names, axes = (_TRANSPOSED if "transpose" in call else _CONV), len(self._target.shape) - 2
        settings = {**dict(zip(names, args[3:], strict=False)), **{k: kwargs[k] for k in names if k in kwargs}}
        stride, dilation = (_each(settings.get(name, 1), axes) for name in ("stride", "dilation"))
        kernel = self._target.shape[2:]
        padding = _padding(settings.get("padding", 0), kernel, dilation)
        summed = value.sum(0) if value.dim() == axes + 2 else value
        sizes, out = summed.shape[1:], output.shape[-axes:]
        columns = []
        for offset in product(*map(range, kernel)):
            shift = [o * d - p for o, d, p in zip(offset, dilation, padding, strict=True)]
            geometry = zip(sizes, out, shift, stride, strict=True)
            if "transpose" in call:
                window = [_inside(into, shift, step, size) for size, into, shift, step in geometry]
            else:
                window = [_read(size, into, shift, step) for size, into, shift, step in geometry]
            columns.append(summed[(slice(None), *window)].flatten(1).sum(1))
        # [channels, kernel positions] -> one row for each group, in the order of `Target.rows`.
        self._squares = self._squares + torch.stack(columns, 1).reshape(self._target.groups, -1)

    @property
    def norm(self) -> Tensor:
        """Shaped like the weight."""
        assert isinstance(self._squares, Tensor)
        per_group, units = self._squares.sqrt(), self._target.units
        rows = per_group[:, None].expand(-1, units // len(per_group), -1)
        return self._target.unrows(rows.reshape(units, -1) if len(per_group) > 1 else rows[0])


def _each(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _padding(value: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[int, ...]:
    """Zeros in front of each axis."""
    if value == "valid":
        return (0,) * len(kernel)
    if value == "same":
        return tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    return _each(value, len(kernel))


def _read(size: int, outputs: int, shift: int, step: int) -> slice:
    """The inputs `q * step + shift` that outputs q read, as far as there are such inputs."""
    first = max(0, -(shift // step))
    last = min(outputs - 1, (size - 1 - shift) // step)
    return slice(first * step + shift, last * step + shift + 1, step) if first <= last else slice(0)


def _inside(outputs: int, shift: int, step: int, size: int) -> slice:
    """The inputs p for which the output `p * step + shift` exists."""
    first = max(0, -(shift // step))
    last = min(size - 1, (outputs - 1 - shift) // step)
    return slice(first, last + 1) if first <= last else slice(0)
