"""How often a unit's whole map averages to exactly zero."""

from __future__ import annotations

from torch import Tensor

__all__ = ["ZeroMaps"]


class ZeroMaps:
    """Share of samples whose map, averaged over its positions, is exactly 0; `[units]`, streamed."""

    def __init__(self) -> None:
        self._samples = 0
        self._zero: Tensor | None = None

    def update(self, activation: Tensor, unit_axis: int) -> None:
        """Add one batch: units along axis 1, positions behind it; or units last (-1), positions before it."""
        value = activation.detach()
        if value.dim() > 2:
            value = value.flatten(2).sum(-1) if unit_axis == 1 else value.flatten(1, -2).sum(1)
        zero = (value == 0).sum(0)
        self._samples += len(value)
        self._zero = zero if self._zero is None else self._zero + zero

    @property
    def fraction(self) -> Tensor:
        assert self._zero is not None
        return self._zero.double() / self._samples
