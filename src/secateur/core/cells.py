"""Read access to one tensor of cells as flat NumPy chunks that fit the cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError

__all__ = ["CHUNK", "Array", "Cells"]

CHUNK = 1 << 17
Array = np.ndarray


class Cells:
    """One tensor of scores (or weights), in its own order; absolute values are taken on the way, without a copy.

    Cells listed in `safe` read as infinite: they are out of the contest.
    """

    def __init__(self, name: str, tensor: Tensor, absolute: bool) -> None:
        data = tensor.detach()
        if data.dtype in (torch.bfloat16, torch.float16):
            data = data.float()
        elif not data.is_floating_point():
            data = data.double()
        self.name, self.absolute, self.shape, self.device = name, absolute, tuple(tensor.shape), tensor.device
        self.flat: Array = data.cpu().contiguous().view(-1).numpy()
        self.size = int(self.flat.size)
        self.safe: Array = np.empty(0, np.intp)

    def chunks(self) -> Iterator[tuple[int, Array]]:
        """(offset, values) pieces; one is overwritten by the next."""
        buffer = np.empty(min(CHUNK, self.size), self.flat.dtype) if self.absolute else None
        for start in range(0, self.size, CHUNK):
            piece = self.flat[start : start + CHUNK]
            values = np.abs(piece, out=buffer[: piece.size]) if buffer is not None else piece
            first, last = np.searchsorted(self.safe, (start, start + CHUNK))
            if first < last:
                values = values.copy()
                values[self.safe[first:last] - start] = np.inf
            yield start, values

    def take(self, index: Array) -> Array:
        """The cells at `index`, whether safe or not."""
        values = self.flat[index]
        return np.abs(values) if self.absolute else values

    def all(self) -> Array:
        """A copy of all cells."""
        values = np.abs(self.flat) if self.absolute else self.flat.copy()
        values[self.safe] = np.inf
        return values

    def above(self, threshold: float) -> Array:
        """Which cells are larger, as flat booleans."""
        keep = np.empty(self.size, bool)
        for start, values in self.chunks():
            np.greater(values, threshold, out=keep[start : start + values.size])
        return keep

    def equal(self, threshold: float) -> Array:
        """Flat indices of the cells that are equal, in order."""
        found = [start + np.flatnonzero(values == threshold) for start, values in self.chunks()]
        equal = np.concatenate(found) if found else np.empty(0, np.intp)
        return np.setdiff1d(equal, self.safe, assume_unique=True) if self.safe.size else equal

    def refuse_nan(self) -> None:
        """Raises: `DataError` that says where the first NaN is."""
        for start, values in self.chunks():
            if np.isnan(values).any():
                at = start + int(np.flatnonzero(np.isnan(values))[0])
                raise DataError(
                    f'scores of "{self.name}" are not numbers: first NaN at flat index {at} of {self.size}; '
                    "the weights or the criterion diverged"
                )

    def as_mask(self, keep: Array) -> Tensor:
        """Flat booleans, shaped and placed like the tensor."""
        return torch.from_numpy(keep).reshape(self.shape).to(self.device)
