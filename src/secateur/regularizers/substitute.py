"""Other tensors in a layer's place of its parameters while it runs: inside the graph, and for that time only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.targets import Target
from secateur.regularizers.attachment import Hook
from secateur.regularizers.layers import only_input
from secateur.regularizers.unit_sites import over_units

__all__ = ["multiply_units", "substitute"]


class _PutBack:
    """Beside the hooks of a layer, it gives it its own parameters back: an interrupt runs no hooks behind the layer."""

    def __init__(self, layer: nn.Module, own: dict[str, nn.Parameter | None]) -> None:
        self._layer, self._own = layer, own

    def put_back(self) -> None:
        self._layer._parameters.update(self._own)
        self._own.clear()

    def remove(self) -> None:
        self.put_back()


def substitute(layer: nn.Module, make: Callable[[Any, Tensor], Mapping[str, Tensor]]) -> list[Any]:
    """Run `layer` with `make(layer, input)`, by parameter name, in place of its own weight or bias.

    Gradients flow through the tensors made, so that a factor in them is learned like any parameter. Works under
    `torch.compile`.
    """
    own: dict[str, nn.Parameter | None] = {}
    left = _PutBack(layer, own)

    def put(module: nn.Module, args: Any, kwargs: Any) -> None:
        if own:
            left.put_back()
        made: Any = make(module, only_input(args, kwargs))
        for name, tensor in made.items():
            own[name] = module._parameters[name]
            module._parameters[name] = tensor

    def put_back(module: nn.Module, *_: Any) -> None:
        module._parameters.update(own)
        own.clear()

    return [
        layer.register_forward_pre_hook(Hook(put), with_kwargs=True),
        layer.register_forward_hook(Hook(put_back), always_call=True),
        left,
    ]


def multiply_units(
    layer: nn.Module, target: Target, axis: int, factor: Callable[[nn.Module], Tensor | None]
) -> list[Any]:
    """Multiply the target's units by `factor(layer)`, `[units]`, where `layer` puts them out; None leaves them.

    In the weight and bias of `layer` where these are fewer numbers than its outputs, as they mostly are; else in
    the outputs, in place if the factor is not learned. Compiled, a factor that is not learned multiplies outputs.

    Args:
        layer: the target's, or the BatchNorm behind it.
        axis: of the layer's outputs, along which the units lie.
    """

    own: dict[str, nn.Parameter | None] = {}
    # What the outputs of the present call are multiplied by: one entry, once it is known.
    outputs: list[Tensor | None] = []
    left = _PutBack(layer, own)

    def put(module: Any, args: Any, kwargs: Any) -> None:
        if own:
            left.put_back()
        value = factor(module)
        outputs[:] = [None]
        if value is None:
            return
        parameters = module._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        # The compiler makes it part of what writes the outputs, which is quicker than other weights.
        joined = torch.compiler.is_compiling() and not value.requires_grad
        if joined or weight is None or not (weight.dim() == 1 or _is_smaller(module, target, only_input(args, kwargs))):
            outputs[:] = [value]
            return
        own["weight"] = weight
        parameters["weight"] = weight * (value if weight.dim() == 1 else target.spread(value))
        if bias is not None:
            own["bias"] = bias
            parameters["bias"] = bias * value

    def put_back(module: nn.Module, args: Any, output: Tensor | None) -> Tensor | None:
        if own:
            module._parameters.update(own)
            own.clear()
        # A hook put in by a hook of the same layer takes part only from the next call on.
        value = outputs.pop() if outputs else factor(module)
        # Without an output the layer has raised an error.
        if value is None or output is None:
            return None
        value = over_units(value.unsqueeze(0), output, axis).to(output.dtype)
        # No layer here needs its output to go backward, and a second copy would cost time and memory.
        return output * value if value.requires_grad else output.mul_(value)

    return [
        layer.register_forward_pre_hook(Hook(put), with_kwargs=True),
        layer.register_forward_hook(Hook(put_back), always_call=True),
        left,
    ]


def _is_smaller(module: Any, target: Target, x: Tensor) -> bool:
    """Whether the weight has fewer numbers than the outputs have at this input."""
    inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    return x.numel() // inputs > target.fan_in
