"""Random numbers that a seed drawn outside the graph determines, wherever and whenever they are made."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.core.normal import standard_normal
from secateur.regularizers.stream import NoiseStream

__all__ = ["draw_seeds", "logistic_like", "normal_like"]


def draw_seeds(stream: NoiseStream, count: int) -> list[int]:
    """`count` seeds of 62 bits from a stream that lives on the CPU."""
    bits = stream.bernoulli((count, 62), 0.5)
    seeds: list[int] = (bits * (2 ** torch.arange(62))).sum(1).tolist()
    return seeds


def _logistic_like(like: Tensor, seed: Tensor) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(int(seed))
    uniform = torch.rand(like.shape, generator=generator, device=like.device)
    noise = uniform.logit_(eps=1e-6).to(like.dtype)
    return noise if noise.stride() == like.stride() else torch.empty_like(like).copy_(noise)


def _normal_like(like: Tensor, seed: Tensor) -> Tensor:
    if like.device.type == "cpu" and like.dtype != torch.float64:
        drawn = standard_normal(like.numel(), np.random.SFC64(int(seed)), terms=1)
        return torch.from_numpy(drawn).to(like.dtype).reshape(like.shape)
    generator = torch.Generator(like.device).manual_seed(int(seed))
    # Contiguous whatever `like` is, so that the layout of the activations does not decide which number goes where.
    return torch.empty(like.shape, dtype=like.dtype, device=like.device).normal_(generator=generator)


def _shaped_like(like: Tensor, seed: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _laid_out_like(like: Tensor, seed: Tensor) -> Tensor:
    return torch.empty_like(like)


def _operator(name: str, make: Any, shape: Any) -> Any:
    """An operator, because a compiled graph cannot draw from a generator; to the graph it is a pure function."""
    schema = "(Tensor like, Tensor seed) -> Tensor"
    made = torch.library.custom_op(f"secateur::{name}", make, mutates_args=(), schema=schema)
    made.register_fake(shape)
    return made


_normal = _operator("normal_like", _normal_like, _shaped_like)
_logistic = _operator("logistic_like", _logistic_like, _laid_out_like)


def normal_like(like: Tensor, seed: Tensor) -> Tensor:
    """Standard normal numbers, shape and dtype of `like`; no gradient. Works inside compiled graphs.

    On the CPU and below float64 they are one of 65,536 quantiles, see `secateur.core.normal`: twice as fast.

    Args:
        seed: an int64 number on the CPU.

    Randomness: determined by the seed, the shape, the dtype and the device type; no generator is touched.
    """
    noise: Tensor = _normal(like.detach(), seed)
    return noise


def logistic_like(like: Tensor, seed: Tensor) -> Tensor:
    """Numbers of the standard logistic distribution, shape, layout and dtype of `like`; no gradient. Made of uniform
    float32 numbers within [1e-6, 1 - 1e-6]. Works inside compiled graphs.

    Args:
        seed: an int64 number on the CPU.

    Randomness: determined by the seed, the shape and the device type; no generator is touched.
    """
    # An operator costs more to call, which counts where layers are small.
    make = _logistic if torch.compiler.is_compiling() else _logistic_like
    noise: Tensor = make(like.detach(), seed)
    return noise
