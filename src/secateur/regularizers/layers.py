"""Layers as functions: what a method needs that changes weights or outputs inside the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.targets import Target, Targets
from secateur.errors import UsageError

__all__ = ["layer_output", "layers_of", "only_input", "refuse_unsupported"]

_PLAIN = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_TRANSPOSED = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}


def layers_of(network: nn.Module, target: Target) -> list[nn.Module]:
    """Every layer that holds the target's weight; several if it is tied."""
    names = (target.name, *target.aliases)
    layers = [network.get_submodule(name.rpartition(".")[0]) for name in names]
    return list({id(layer): layer for layer in layers}.values())


def refuse_unsupported(method: str, network: nn.Module, targets: Targets) -> None:
    """`UsageError` if a target's layer does more, or less, than apply its weight and bias to its input."""
    attention = {id(m.out_proj) for m in network.modules() if isinstance(m, nn.MultiheadAttention)}
    holders: dict[int, set[int]] = {}
    for module in network.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(id(module))
    for target in targets:
        layers = layers_of(network, target)
        for layer in layers:
            if what := _obstacle(layer, id(layer) in attention):
                raise _refused(method, target, what)
        if holders[id(network.get_parameter(target.name))] != {id(layer) for layer in layers}:
            raise _refused(method, target, "shares its weight with a module of another kind")


def _obstacle(layer: nn.Module, attention: bool) -> str | None:
    if attention or isinstance(layer, nn.MultiheadAttention):
        return "belongs to an attention layer"
    if "forward" in vars(layer) or not any(_runs_as(layer, plain) for plain in _PLAIN):
        return f"is a {type(layer).__name__} with a forward of its own"
    added = sorted(layer._parameters.keys() - {"weight", "bias"})
    return f'has a parameter "{added[0]}", of another attached method perhaps' if added else None


def _runs_as(layer: nn.Module, plain: type[nn.Module]) -> bool:
    # Convolutions are what they are by this method, which `forward` calls.
    names = ("forward", "_conv_forward")
    return all(getattr(type(layer), name, None) is getattr(plain, name, None) for name in names)


def _refused(method: str, target: Target, what: str) -> UsageError:
    return UsageError(
        f'{method}: layer "{target.module}" {what}; expected a Linear or convolution layer of torch that is called '
        f"as it is; leave it out (exclude: [{target.name}])"
    )


def only_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor a layer was called with."""
    x: Tensor = args[0] if args else kwargs["input"]
    return x


def layer_output(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, size: torch.Size) -> Tensor:
    """What `layer` would put out for `x` with another weight and bias.

    Args:
        size: shape of the layer's own output for `x`, which settles what a transposed convolution leaves open.
    """
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    if not layer.transposed:
        # The only way to have the layer's padding mode.
        output: Tensor = layer._conv_forward(x, weight, bias)
        return output
    spatial = len(layer.kernel_size)
    left_over = [
        size[axis - spatial] - (x.shape[axis - spatial] - 1) * stride + 2 * padding - dilation * (kernel - 1) - 1
        for axis, (stride, padding, dilation, kernel) in enumerate(
            zip(layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True)
        )
    ]
    transposed: Any = _TRANSPOSED[weight.dim()]
    result: Tensor = transposed(x, weight, bias, layer.stride, layer.padding, left_over, layer.groups, layer.dilation)
    return result
