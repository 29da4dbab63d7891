"""Random streams named by what they are for, so that any one of them can be redrawn alone.

A stream is identified by the run's seed and a few keys ("order" and the epoch, "augment" and the step, a
layer's name). It depends on nothing else: not on how many numbers other streams used, not on the process,
not on the global generators of torch and numpy, which are never touched.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch

from secateur.errors import UsageError

__all__ = ["keyed_generator", "keyed_numpy", "keyed_seed"]


def keyed_seed(seed: int, *keys: str | int) -> int:
    """A 63-bit seed from a root seed and keys: the first bytes of a SHA-256 of both.

    Args:
        seed: the root seed, any integer.
        keys: what the stream is for; `1` and `"1"` are different keys, and the order counts.

    Raises:
        UsageError: a seed or key that is neither an integer nor a string (True and 1.0 are neither).

    Examples:
        >>> keyed_seed(0, "order", 3) == keyed_seed(0, "order", 3)
        True
        >>> keyed_seed(0, "order", 3) == keyed_seed(0, "order", 4)
        False
    """
    for key in (seed, *keys):
        # bool is an int to Python, but True and 1 would silently name two different streams in JSON.
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise UsageError(f"random stream: got key {key!r}, expected an int or a str")
    if isinstance(seed, str):
        raise UsageError(f"random stream: got seed {seed!r}, expected an integer")
    digest = hashlib.sha256(json.dumps([seed, *keys], ensure_ascii=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def keyed_generator(seed: int, *keys: str | int) -> torch.Generator:
    """A CPU `torch.Generator` for the stream `(seed, *keys)`.

    Draw on the CPU and move the result: the same stream then gives the same numbers on every device.

    Examples:
        >>> a, b = (torch.rand(2, generator=keyed_generator(0, "mask", "conv1")) for _ in range(2))
        >>> torch.equal(a, b)
        True
    """
    return torch.Generator().manual_seed(keyed_seed(seed, *keys))


def keyed_numpy(seed: int, *keys: str | int) -> np.random.Generator:
    """A numpy generator (SFC64, the quickest numpy has) for the stream `(seed, *keys)`.

    Examples:
        >>> int(keyed_numpy(0, "x").integers(100)) == int(keyed_numpy(0, "x").integers(100))
        True
    """
    return np.random.Generator(np.random.SFC64(keyed_seed(seed, *keys)))
