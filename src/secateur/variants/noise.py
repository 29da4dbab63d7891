"""Gaussian noise that is the same to the bit on every machine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from secateur.core import normal
from secateur.core.seeds import keyed_numpy

__all__ = ["add_noise", "standard_normal"]


def standard_normal(count: int, seed: int, *keys: str | int) -> np.ndarray:
    """`count` float32 numbers of the standard normal distribution.

    Randomness: the stream of `(seed, *keys)`, see `secateur.core.seeds`; a longer draw begins with a shorter one.

    Cost: 3 ns a number.

    Examples:
        >>> standard_normal(3, 0, "conv1.weight").tolist() == standard_normal(5, 0, "conv1.weight")[:3].tolist()
        True
    """
    return normal.standard_normal(count, keyed_numpy(seed, "gaussian", *keys).bit_generator)


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
