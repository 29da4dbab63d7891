"""Sees each unit's activation where it leaves the unit alone: after its layer, BatchNorm and activation function.

Works on any eager network, with modules or plain functions, because it watches torch function calls: a layer
is recognized by the identity of its weight, and its output is followed through element-wise functions and
BatchNorm until something else (another layer, an addition, a pooling) consumes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["Activation", "UnitOutputs"]

_LAYERS = {
    "linear": -1,
    "conv1d": 1,
    "conv2d": 1,
    "conv3d": 1,
    "conv_transpose1d": 1,
    "conv_transpose2d": 1,
    "conv_transpose3d": 1,
}
_FOLLOWED = frozenset(
    [
        "relu",
        "relu_",
        "relu6",
        "leaky_relu",
        "leaky_relu_",
        "elu",
        "elu_",
        "selu",
        "selu_",
        "celu",
        "celu_",
        "gelu",
        "silu",
        "silu_",
        "mish",
        "mish_",
        "sigmoid",
        "sigmoid_",
        "tanh",
        "tanh_",
        "softplus",
        "softsign",
        "logsigmoid",
        "hardswish",
        "hardswish_",
        "hardsigmoid",
        "hardtanh",
        "hardtanh_",
        "threshold",
        "threshold_",
        "prelu",
        "rrelu",
        "rrelu_",
        "dropout",
        "dropout_",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
        "batch_norm",
        "contiguous",
    ]
)
# No value below zero comes out of these; the others in `_FOLLOWED` may give one.
_NONNEGATIVE = frozenset(["relu", "relu_", "relu6", "sigmoid", "sigmoid_", "hardsigmoid", "softplus"])
_KEEP_SIGN = frozenset(["dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "contiguous"])
# Looking at a tensor does not use it up.
_LOOKS = frozenset(
    ["__get__", "size", "dim", "numel", "is_floating_point", "is_contiguous", "stride", "device", "dtype", "__len__"]
)


class Activation(NamedTuple):
    """The units of target `name` at work: `value`, with one unit per index along `unit_axis`.

    `nonnegative` is True where the function that made it allows no value below zero.
    """

    name: str
    value: Tensor
    unit_axis: int
    nonnegative: bool = False


class UnitOutputs(TorchFunctionMode):
    """Calls `on_output(activation, clobbered)` once per layer call inside the `with` block.

    Args:
        weights: id of the weight tensor -> target name.
        on_output: `clobbered` is True when the activation is about to be overwritten in place.
        on_call: called as `on_call(name, function name, args, kwargs, output)` right after each layer call.

    After the block, `norms` maps target names to the id of the BatchNorm scale that follows them.
    """

    def __init__(
        self,
        weights: Mapping[int, str],
        on_output: Callable[[Activation, bool], None],
        on_call: Callable[[str, str, tuple[Any, ...], dict[str, Any], Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self._weights = dict(weights)
        self._on_output, self._on_call = on_output, on_call
        self._open: dict[int, Activation] = {}
        self.norms: dict[str, int] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _LOOKS:
            return func(*args, **kwargs)
        source = args[0] if args else kwargs.get("input")
        if name in _FOLLOWED and id(source) in self._open:
            layer, _, axis, nonnegative = self._open.pop(id(source))
            if name == "batch_norm":
                self._remember_norm(layer, args, kwargs)
            out = func(*args, **kwargs)
            nonnegative = name in _NONNEGATIVE or (nonnegative and name in _KEEP_SIGN)
            self._open[id(out)] = Activation(layer, out, axis, nonnegative)
            return out
        if self._open:
            self._close_inputs(args, kwargs, clobbered=_writes_in_place(name))
        out = func(*args, **kwargs)
        if name in _LAYERS:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            known = self._weights.get(id(weight))
            if known is not None:
                self._open[id(out)] = Activation(known, out, _LAYERS[name])
                if self._on_call is not None:
                    self._on_call(known, name, args, kwargs, out)
        return out

    def _remember_norm(self, layer: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scale = args[3] if len(args) > 3 else kwargs.get("weight")
        if scale is not None:
            self.norms[layer] = id(scale)

    def _close_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any], clobbered: bool) -> None:
        stack: list[Any] = [*args, *kwargs.values()]
        while stack:
            item = stack.pop()
            if isinstance(item, Tensor):
                if id(item) in self._open:
                    self._on_output(self._open.pop(id(item)), clobbered)
            elif isinstance(item, list | tuple):
                stack.extend(item)

    def finish(self) -> None:
        """Report outputs that nothing consumed (the network's own outputs). Call after each forward pass."""
        # Taken out first: what on_output computes must not be seen as uses of the outputs it is given.
        left, self._open = list(self._open.values()), {}
        for activation in left:
            self._on_output(activation, False)


def _writes_in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name != "__invert__")
