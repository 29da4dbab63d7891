"""All but the k entries of smallest magnitude in every row, exactly k of them, fast."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["all_but_lowest"]

# Without their sign bit, floats compare as the integers that share their bits, and integers partition faster.
_BITS: dict[torch.dtype, tuple[torch.dtype, np.signedinteger[Any]]] = {
    torch.float16: (torch.int16, np.int16(0x7FFF)),
    torch.bfloat16: (torch.int16, np.int16(0x7FFF)),
    torch.float32: (torch.int32, np.int32(0x7FFF_FFFF)),
    torch.float64: (torch.int64, np.int64(0x7FFF_FFFF_FFFF_FFFF)),
}

_PIECE = 1 << 16


def all_but_lowest(values: Tensor, k: int) -> Tensor:
    """Bool tensor, False at the `k` entries of smallest |value| in each row of `values` `[rows, n]`.

    Among equal magnitudes the lowest index counts as the smallest. On the CPU by partial partitioning (about 1 ns
    an entry); elsewhere by a stable sort.

    Examples:
        >>> all_but_lowest(torch.tensor([[3.0, 1.0, -2.0, -1.0]]), 1).tolist()
        [[True, False, True, True]]
    """
    if k <= 0:
        return torch.ones_like(values, dtype=torch.bool)
    if k >= values.shape[1]:
        return torch.zeros_like(values, dtype=torch.bool)
    if values.device.type != "cpu":
        order = torch.sort(values.abs(), dim=1, stable=True).indices[:, :k]
        return torch.ones_like(values, dtype=torch.bool).scatter_(1, order, False)
    integer, all_but_sign = _BITS[values.dtype]
    bits = values.contiguous().view(integer).numpy()
    above = np.empty(bits.shape, dtype=bool)
    # So many rows at a time as fit into a cache with what is made of them.
    rows = max(1, min(len(bits), _PIECE // bits.shape[1]))
    magnitudes = np.empty((rows, bits.shape[1]), dtype=bits.dtype)
    parted = np.empty_like(magnitudes)
    for start in range(0, len(bits), rows):
        here = above[start : start + rows]
        magnitude, sorted_ = magnitudes[: len(here)], parted[: len(here)]
        np.bitwise_and(bits[start : start + rows], all_but_sign, out=magnitude)
        sorted_[...] = magnitude
        sorted_.partition(k - 1, axis=1)
        threshold = sorted_[:, k - 1 : k]
        np.greater(magnitude, threshold, out=here)
        if np.count_nonzero(here) != (magnitude.shape[1] - k) * len(here):
            _add_surplus_ties(magnitude, threshold, here, k)
    return torch.from_numpy(above)


def _add_surplus_ties(magnitude: np.ndarray, threshold: np.ndarray, above: np.ndarray, k: int) -> None:
    expected = magnitude.shape[1] - k
    for row in np.flatnonzero(above.sum(1) < expected):
        equal = np.flatnonzero(magnitude[row] == threshold[row])
        above[row, equal[equal.size - (expected - int(above[row].sum())) :]] = True
