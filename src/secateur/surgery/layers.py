"""How each layer type stores its units: which tensors, along which dimension, and which attributes count them.

This is the only place that knows layer types; groups, plans and cuts are plain data made from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.utils import parametrize

from secateur.core.groups import Role

__all__ = ["Slices", "is_depthwise", "slices_of"]

Side = Literal["out", "in", "both"]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_INSTANCE_NORM = nn.modules.instancenorm._InstanceNorm


@dataclass(frozen=True)
class Slices:
    """One side of a layer, as tensors to slice and attributes to shrink.

    Args:
        role: what the layer is to the units on this side.
        size: number of entries on this side.
        tensors: (attribute, dimension, groups), see `Member`.
        sizes: attributes that count the entries.
        blocks: equal counts must be kept in this many contiguous blocks of the entries.
    """

    role: Role
    size: int
    tensors: tuple[tuple[str, int, int], ...]
    sizes: tuple[str, ...]
    blocks: int = 1


def is_depthwise(module: nn.Module) -> bool:
    """A convolution with one filter per input channel: its units pass through."""
    return isinstance(module, (*_CONV, *_CONV_TRANSPOSE)) and (
        module.groups == module.in_channels == module.out_channels > 1
    )


def slices_of(module: nn.Module, side: Side) -> Slices | str:
    """The slices on one side of `module` (`"both"`: the units pass through), or why it cannot be cut."""
    found = _slices(module, side)
    if isinstance(found, str):
        return found
    for attribute, _, _ in found.tensors:
        # A parametrized or hook-pruned weight is recomputed from other tensors; slicing it would not last.
        if parametrize.is_parametrized(module, attribute) or f"{attribute}_orig" in module._parameters:
            return f"its {attribute} is parametrized; remove the parametrization first"
    present = [t for t in found.tensors if getattr(module, t[0], None) is not None]
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        # Without scale nothing is sliced, but the plan must still say which entries the norm runs over.
        present = [found.tensors[0], *[t for t in present if t != found.tensors[0]]]
    return Slices(found.role, found.size, tuple(present), found.sizes, found.blocks)


def _slices(module: nn.Module, side: Side) -> Slices | str:
    if isinstance(module, (*_CONV, *_CONV_TRANSPOSE)):
        return _conv_slices(module, side)
    if isinstance(module, nn.Linear):
        if side == "out":
            return Slices("producer", module.out_features, (("weight", 0, 1), ("bias", 0, 1)), ("out_features",))
        return Slices("consumer", module.in_features, (("weight", 1, 1),), ("in_features",))
    if isinstance(module, nn.Embedding):
        return Slices("producer", module.embedding_dim, (("weight", 1, 1),), ("embedding_dim",))
    scale = (("weight", 0, 1), ("bias", 0, 1))
    if isinstance(module, _BATCH_NORM | _INSTANCE_NORM):
        tensors = (*scale, ("running_mean", 0, 1), ("running_var", 0, 1))
        return Slices("follower", module.num_features, tensors, ("num_features",))
    if isinstance(module, nn.GroupNorm):
        return Slices("follower", module.num_channels, scale, ("num_channels",), blocks=module.num_groups)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        if len(module.normalized_shape) != 1:
            return f"it normalizes over {len(module.normalized_shape)} dimensions at once"
        return Slices("follower", module.normalized_shape[0], scale, ("normalized_shape",))
    if isinstance(module, nn.PReLU):
        return Slices("follower", module.num_parameters, (("weight", 0, 1),), ("num_parameters",))
    return f"cutting {type(module).__name__} is not supported"


def _conv_slices(module: nn.Module, side: Side) -> Slices | str:
    assert isinstance(module, (*_CONV, *_CONV_TRANSPOSE))
    groups = module.groups
    if is_depthwise(module):
        sizes = ("in_channels", "out_channels", "groups")
        return Slices("follower", module.out_channels, (("weight", 0, 1), ("bias", 0, 1)), sizes)
    if side == "both":
        return f"a convolution of {module.in_channels} to {module.out_channels} channels in {groups} groups"
    transposed = isinstance(module, _CONV_TRANSPOSE)
    if side == "out":
        weight = ("weight", 1, groups) if transposed else ("weight", 0, 1)
        return Slices("producer", module.out_channels, (weight, ("bias", 0, 1)), ("out_channels",), groups)
    weight = ("weight", 0, 1) if transposed else ("weight", 1, groups)
    return Slices("consumer", module.in_channels, (weight,), ("in_channels",), groups)
