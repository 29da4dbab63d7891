"""Per-unit activation statistics, streamed: O(units) memory, reductions in two steps for speed."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

__all__ = ["ActivationStatistics", "taylor_map"]


# Values looked at together: enough to hide the cost of a call, few enough to keep temporaries small.
_CHUNK = 1 << 21
# Positions that fill whole words with bytes and, in steps of eight, count no byte beyond 255.
_IN_BYTES = range(8, 8 * 255 + 1, 8)


class ActivationStatistics:
    """Mean |a|, unbiased variance and share of exact zeros of each unit, over samples and positions.

    The inner reduction runs over contiguous positions in the activation's own precision (at least float32), the
    outer one over samples and batches in float64.

    Args:
        wanted: which of `"mean_abs"`, `"variance"`, `"zero_fraction"` to keep.

    Cost: a few reads of the activation; temporaries of 8 MB (one sample, if that is larger).
    """

    def __init__(self, wanted: Collection[str]) -> None:
        self._wanted = frozenset(wanted)
        self.count = 0
        self._sums: dict[str, Tensor] = {}

    def update(self, activation: Tensor, unit_axis: int, nonnegative: bool = False) -> None:
        """Add one batch, outside autograd.

        Args:
            activation: `[samples, units, *positions]` with `unit_axis=1`, or `[*samples, units]` with -1.
            unit_axis: 1 or -1.
            nonnegative: no value is below zero, which saves taking absolute values.
        """
        if not self._wanted or not activation.numel():
            return
        if activation.requires_grad:
            activation = activation.detach()
        if unit_axis == 1 and activation.dim() > 2:
            inner, axis = activation.flatten(2), -1
            self.count += inner.shape[0] * inner.shape[2]
        else:
            inner, axis = activation.reshape(-1, activation.shape[-1]), 0
            self.count += inner.shape[0]
        pieces = [inner]
        if inner.numel() > _CHUNK:
            pieces = inner.split(max(1, _CHUNK * inner.shape[0] // inner.numel()))
        for piece in pieces:
            self._add(piece if piece.dtype.itemsize > 2 else piece.float(), axis, nonnegative)

    def _add(self, piece: Tensor, axis: int, nonnegative: bool) -> None:
        # Plain sums, read-only where possible: L1 and L0 norms and `count_nonzero` take 4 to 15 times as long.
        total = piece.sum(axis) if nonnegative or "variance" in self._wanted else None
        if "mean_abs" in self._wanted:
            self._add_sum("abs", total if nonnegative else piece.abs().sum(axis))
        if "variance" in self._wanted:
            self._add_sum("sum", total)
            if axis == -1:
                self._add_sum("square", torch.linalg.vector_norm(piece, 2, dim=-1).double().square())
            else:
                self._add_sum("square", (piece * piece).sum(axis))
        if "zero_fraction" in self._wanted:
            self._add_sum("nonzero", _nonzero(piece, axis))

    def _add_sum(self, key: str, partial: Tensor | None) -> None:
        assert partial is not None
        total = partial.double() if partial.dim() == 1 else partial.sum(0, dtype=torch.float64)
        self._sums[key] = self._sums[key] + total if key in self._sums else total

    @property
    def mean_abs(self) -> Tensor:
        return self._sums["abs"] / self.count

    @property
    def variance(self) -> Tensor:
        mean = self._sums["sum"] / self.count
        return ((self._sums["square"] - self.count * mean.square()) / max(1, self.count - 1)).clamp_min(0.0)

    @property
    def zero_fraction(self) -> Tensor:
        return 1.0 - self._sums["nonzero"] / self.count


def _nonzero(piece: Tensor, axis: int) -> Tensor:
    """How many values are not zero along `axis`, or along it and the samples."""
    if axis == -1 and piece.is_contiguous() and piece.shape[-1] in _IN_BYTES:
        # Eight counts at a time, one in each byte of an integer.
        counts = piece.to(torch.bool).view(torch.int64).sum(-1)
        return counts.view(torch.uint8).view(*piece.shape[:2], 8).sum((0, 2))
    return torch.ne(piece, 0, out=torch.empty_like(piece)).sum(axis)


def taylor_map(activation: Tensor, gradient: Tensor, unit_axis: int) -> Tensor:
    """Sum over samples of |mean over positions of gradient x activation|, `[units]`, float64.

    Reference: Molchanov et al. 2017, equation 8.

    Examples:
        >>> h, g = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[0.5, -0.25], [1.0, 2.0]])
        >>> float(taylor_map(h[None, None], g[None, None], unit_axis=1))
        0.5
    """
    product = activation * gradient
    if unit_axis == 1:
        per_sample = product.flatten(2).mean(-1) if product.dim() > 2 else product
    else:
        per_sample = product.flatten(1, -2).mean(1) if product.dim() > 2 else product
    return per_sample.abs().sum(0, dtype=torch.float64)
