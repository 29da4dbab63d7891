"""Random numbers that a seed drawn outside the graph determines, wherever and whenever they are made."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.core.normal import standard_normal
from secateur.regularizers.stream import NoiseStream

__all__ = ["draw_seeds", "normal_like", "seeded_uniform"]


def draw_seeds(stream: NoiseStream, count: int) -> list[int]:
    """`count` seeds of 62 bits from a stream that lives on the CPU."""
    bits = stream.bernoulli((count, 62), 0.5)
    seeds: list[int] = (bits * (2 ** torch.arange(62))).sum(1).tolist()
    return seeds


def seeded_uniform(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Float32 numbers uniform in [0, 1).

    Randomness: determined by the seed and the device type.
    """
    return torch.rand(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def _normal_like(like: Tensor, seed: Tensor) -> Tensor:
    if like.device.type == "cpu" and like.dtype != torch.float64:
        drawn = standard_normal(like.numel(), np.random.SFC64(int(seed)), terms=1)
        return torch.from_numpy(drawn).to(like.dtype).reshape(like.shape)
    generator = torch.Generator(like.device).manual_seed(int(seed))
    # Contiguous whatever `like` is, so that the layout of the activations does not decide which number goes where.
    return torch.empty(like.shape, dtype=like.dtype, device=like.device).normal_(generator=generator)


def _shaped_like(like: Tensor, seed: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


# An operator of its own, because a compiled graph cannot draw from a generator; to the graph it is a pure function.
_operator: Any = torch.library.custom_op(
    "secateur::normal_like", _normal_like, mutates_args=(), schema="(Tensor like, Tensor seed) -> Tensor"
)
_operator.register_fake(_shaped_like)


def normal_like(like: Tensor, seed: Tensor) -> Tensor:
    """Standard normal numbers, shape and dtype of `like`; no gradient. Works inside compiled graphs.

    On the CPU and below float64 they are one of 65,536 quantiles, see `secateur.core.normal`: twice as fast.

    Args:
        seed: an int64 number on the CPU.

    Randomness: determined by the seed, the shape, the dtype and the device type; no generator is touched.
    """
    noise: Tensor = _operator(like.detach(), seed)
    return noise
