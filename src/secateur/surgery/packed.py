"""Tensors of mostly zeros for a file: one bit a value, and the values that are not zero. Exact to the bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from secateur.errors import CheckpointError

__all__ = ["pack", "pack_parameters", "unpack", "unpack_parameters"]

_BITS, _KEPT = "secateur.bits.", "secateur.kept."
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# What a second tensor adds to the file's header, about: names, offsets, the shape.
_ENTRY = 256


def pack(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Bits and kept values of a floating-point tensor on the CPU; -0.0 and every NaN are kept as they are.

    Returns: uint8 `[ceil(n / 8)]`, bit `i % 8` from the left of byte `i // 8` for value `i`, unused bits 0; and the
        values whose bit is 1, `[kept]`, in order.

    Examples:
        >>> bits, kept = pack(torch.tensor([0.0, 2.0, 0.0, 3.0]))
        >>> bits.tolist(), kept.tolist()
        ([80], [2.0, 3.0])
    """
    flat = _raw(tensor.detach().contiguous().reshape(-1))
    # By bits, because -0.0 equals 0.0.
    some = flat != 0
    return torch.from_numpy(np.packbits(some.numpy())), flat[some].view(tensor.dtype)


def unpack(bits: Tensor, kept: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor that `pack` was given.

    Raises: `CheckpointError` for parts that do not belong together; found before memory is taken for the tensor.
    """
    if not kept.is_floating_point() or kept.dim() != 1 or bits.dtype != torch.uint8 or bits.dim() != 1:
        kinds = f"{bits.dtype} {list(bits.shape)} and {kept.dtype} {list(kept.shape)}"
        raise CheckpointError(f"got {kinds}, expected bytes and floating-point values, one dimension each")
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in shape):
        raise CheckpointError(f"shape {str(list(shape))[:100]}: expected integers of at least 0")
    count, raw = prod(shape), bits.numpy()
    if len(raw) != (count + 7) // 8 or (count % 8 and raw[-1] & (0xFF >> count % 8)):
        raise CheckpointError(f"{len(raw)} bytes of bits do not fit shape {str(list(shape))[:100]}")
    if (ones := int(np.bitwise_count(raw).sum(dtype=np.int64))) != len(kept):
        raise CheckpointError(f"{ones} bits are set, for {len(kept)} kept values")
    whole = torch.zeros(count, dtype=_INTEGERS[kept.element_size()])
    whole[torch.from_numpy(np.unpackbits(raw, count=count).view(np.bool_))] = _raw(kept)
    return whole.view(kept.dtype).reshape(shape)


def pack_parameters(
    tensors: Mapping[str, Tensor], parameters: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors of a file with those parameters packed that get smaller by it, and the shapes of these by name."""
    found: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        if name in parameters and tensor.is_floating_point():
            bits, kept = pack(tensor)
            if bits.nbytes + kept.nbytes + _ENTRY < tensor.nbytes:
                found |= {_BITS + name: bits, _KEPT + name: kept}
                shapes[name] = list(tensor.shape)
                continue
        found[name] = tensor
    return found, shapes


def unpack_parameters(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Undo `pack_parameters`.

    Args:
        shapes: what the file says.
        expected: shapes of the network's own parameters, which those of the file must be.

    Raises: `CheckpointError` that names the tensor, before memory is taken for it.
    """
    found = dict(tensors)
    for name, shape in shapes.items():
        what = f'the packed tensor "{name[:200]}"'
        if name not in expected:
            raise CheckpointError(f"{what} is no parameter of the network it describes")
        if list(shape) != list(expected[name]):
            raise CheckpointError(
                f"{what} has shape {str(list(shape))[:100]}, and the network's is {list(expected[name])}"
            )
        try:
            found[name] = unpack(found.pop(_BITS + name), found.pop(_KEPT + name), shape)
        except KeyError as error:
            raise CheckpointError(f"{what} lacks {error}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{what}: {error}") from None
    return found


def _raw(flat: Tensor) -> Tensor:
    return flat.view(_INTEGERS[flat.element_size()])
