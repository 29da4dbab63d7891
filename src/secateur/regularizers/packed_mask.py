"""Which weights are kept, eight of them in a byte, and the product of a tensor with that."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.regularizers.stream import as_numbers

__all__ = ["PackedMask", "pack", "unpack"]

# Numbers multiplied at a time on the CPU.
_PIECE = 1 << 18


def pack(kept: Tensor) -> Tensor:
    """Bools to bytes, the first one in the highest bit of the first byte.

    Examples:
        >>> pack(torch.tensor([True, False, False, False, False, False, False, False, True])).tolist()
        [128, 128]
    """
    return torch.from_numpy(np.packbits(kept.numpy())) if kept.device.type == "cpu" else _pack_on_device(kept)


def _pack_on_device(kept: Tensor) -> Tensor:
    flat = kept.reshape(-1).view(torch.uint8)
    eights = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (eights << _places(kept.device)).sum(1, dtype=torch.uint8)


def _places(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` bools that were packed, as bytes 1 and 0."""
    if packed.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=count))
    return _unpack_on_device(packed, count)


def _unpack_on_device(packed: Tensor, count: int) -> Tensor:
    bits = packed.unsqueeze(1) >> _places(packed.device)
    return bits.bitwise_and_(1).view(-1)[:count]


class PackedMask:
    """A multiplier: `factor` where `kept`, 0 elsewhere. Takes a 32nd of the memory of a float32 one.

    Args:
        kept: bools of the shape of what is multiplied, at least one axis.
        factor: finite.
    """

    __slots__ = ("_bits", "_factor", "_shape")

    def __init__(self, kept: Tensor, factor: float = 1.0) -> None:
        self._bits, self._factor, self._shape = pack(kept), factor, kept.shape

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The multiplier as numbers."""
        numbers = as_numbers(unpack(self._bits, self._shape.numel()).view(self._shape), dtype)
        return numbers if self._factor == 1.0 else numbers.mul_(self._factor)

    def multiply_(self, tensor: Tensor) -> None:
        """Multiply `tensor` in place, to the bit as by `dense`."""
        if tensor.device.type == "cpu":
            self._multiply_in_pieces(tensor)
            return
        tensor.mul_(unpack(self._bits, tensor.numel()).view(self._shape))
        if self._factor != 1.0:
            tensor.mul_(self._factor)

    def _multiply_in_pieces(self, tensor: Tensor) -> None:
        # numpy multiplies by bytes without a float copy of them, but knows no bfloat16.
        numbers: Any = tensor if tensor.dtype is torch.bfloat16 else tensor.numpy()
        bits, row = self._bits.numpy(), self._shape[1:].numel()
        # Eight rows begin at a whole byte, whatever their length.
        rows = max(1, _PIECE // (8 * max(1, row))) * 8
        with np.errstate(all="ignore"):
            for start in range(0, len(numbers), rows):
                piece = numbers[start : start + rows]
                kept: Any = np.unpackbits(bits[start * row // 8 :], count=len(piece) * row).reshape(piece.shape)
                piece *= kept if numbers is not tensor else torch.from_numpy(kept)
                if self._factor != 1.0:
                    piece *= self._factor
