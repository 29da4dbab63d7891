"""What several of the networks share: checks of their arguments and small layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.errors import UsageError

__all__ = ["FeatureScale", "check_pools", "check_widths", "conv3x3"]


class FeatureScale(nn.Module):
    """A learnable factor for each feature of the last axis, 1 at first: `y = x * weight`.

    DDROP puts one after the first linear layer of a transformer's MLP, so that hidden features have a scale
    to be ranked by, as BatchNorm gives one to channels.

    Shape: `[..., features]` to the same; `weight` is `[features]`.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def extra_repr(self) -> str:
        return str(self.weight.numel())


def conv3x3(inputs: int, outputs: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    """A 3x3 convolution that keeps height and width at stride 1."""
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def check_widths(network: str, argument: str, widths: Sequence[int], count: int | None = None) -> tuple[int, ...]:
    """`widths` as a tuple, if they are positive integers, `count` of them; `UsageError` otherwise."""
    if isinstance(widths, str) or not isinstance(widths, Sequence):
        raise UsageError(f'model "{network}": {argument} got {widths!r}, expected a list of integers')
    if any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in widths):
        raise UsageError(f'model "{network}": {argument} got {list(widths)}, expected integers of at least 1')
    if count is not None and len(widths) != count:
        raise UsageError(f'model "{network}": {argument} got {len(widths)} widths, expected {count}')
    return tuple(widths)


def check_pools(network: str, in_shape: Sequence[int], halvings: int) -> tuple[int, int, int]:
    """Channels, and height and width after `halvings` halvings; `UsageError` when nothing would be left."""
    channels, height, width = in_shape
    if min(height, width) < 2**halvings:
        raise UsageError(
            f'model "{network}" halves its input {halvings} times: got {height}x{width} images, '
            f"expected at least {2**halvings}x{2**halvings}; choose a smaller network or larger images"
        )
    return channels, height >> halvings, width >> halvings
