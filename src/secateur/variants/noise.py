"""Gaussian noise that is the same to the bit on every machine.

The normal generators of torch and numpy call logarithms and cosines whose last bits differ between processors. Here
only integers are drawn: two 16-bit numbers choose two of the 65,536 quantiles of the normal distribution, and their sum
over the square root of two is the noise, with 2^31 different values, out to 6.1 deviations, of variance 0.99998.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from secateur.core.seeds import keyed_numpy

__all__ = ["add_noise", "standard_normal"]

# Numbers drawn at a time, so that what is looked up stays in the cache. The stream does not depend on it.
_CHUNK = 1 << 15
_ROOT_HALF = np.float32(0.5**0.5)


@cache
def _quantiles() -> np.ndarray:
    from scipy.special import ndtri

    table: np.ndarray = ndtri((np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float32)
    table.flags.writeable = False
    return table


def standard_normal(count: int, seed: int, *keys: str | int) -> np.ndarray:
    """`count` float32 numbers of the standard normal distribution.

    Randomness: the stream of `(seed, *keys)`, see `secateur.core.seeds`; a longer draw begins with a shorter one.

    Cost: 3 ns a number.

    Examples:
        >>> standard_normal(3, 0, "conv1.weight").tolist() == standard_normal(5, 0, "conv1.weight")[:3].tolist()
        True
    """
    table, bits = _quantiles(), keyed_numpy(seed, "gaussian", *keys).bit_generator
    out = np.empty(count, np.float32)
    index, second = np.empty(_CHUNK, np.intp), np.empty(_CHUNK, np.float32)
    for start in range(0, count, _CHUNK):
        piece = out[start : start + _CHUNK]
        # Little-endian by name: two of the four 16-bit parts of a word make one number.
        words = bits.random_raw((piece.size + 1) // 2).astype("<u8", copy=False).view("<u2")
        for column, into in ((0, piece), (1, second[: piece.size])):
            chosen = index[: piece.size]
            chosen[:] = words[column::2][: piece.size]
            np.take(table, chosen, mode="clip", out=into)
        piece += second[: piece.size]
        piece *= _ROOT_HALF
    return out


def add_noise(weight: Tensor, sigma: float, seed: int, name: str, out: Tensor) -> Tensor:
    """`out` = `weight` + sigma z; at sigma = 0 the same bits.

    Args:
        sigma: at least 0.
        name: of the target, which has a stream of its own.
    """
    if sigma == 0.0:
        return out.copy_(weight)
    noise = standard_normal(weight.numel(), seed, name)
    # Rounded twice, because a processor may do both in one step and round once.
    noise *= np.float32(sigma)
    added = torch.from_numpy(noise).reshape(weight.shape).to(weight.device, weight.dtype)
    return torch.add(weight, added, out=out)
