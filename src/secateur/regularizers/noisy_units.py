"""Units of large layers multiplied while a network runs, so that no second weight is kept for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.regularizers.noisy_weight import NoisyWeight
from secateur.regularizers.quiet_pass import tensors_in
from secateur.regularizers.stream import as_numbers
from secateur.regularizers.watch import Watch, is_look, property_of

__all__ = ["NoisyUnits", "is_per_unit"]

_LAYERS = frozenset(["linear", "conv1d", "conv2d", "conv3d"])
# What they give, or take, may be written into by others.
_APART = frozenset(["detach", "__set__"])


class _Draw(NamedTuple):
    slot: NoisyWeight
    multiplier: Tensor
    factor: float

    def numbers(self) -> Tensor:
        """One number a unit, shaped like the weight's units."""
        kept, dtype = self.multiplier, self.slot.parameter.dtype
        numbers = as_numbers(kept, dtype) if kept.dtype is torch.bool else kept.to(dtype)
        return numbers * self.factor


def is_per_unit(multiplier: Tensor, weight: Tensor) -> bool:
    """Whether that is one number for each unit of a Linear or convolution layer's weight."""
    return multiplier.shape == (weight.shape[0], *[1] * (weight.dim() - 1))


class NoisyUnits(Watch):
    """Between `start` and `stop` every function that reads the weight of a slot reads `weight * multiplier * factor`.

    A Linear or convolution function whose outputs are fewer than its weights has its outputs multiplied instead, before
    the bias is added. The weights themselves stay plain.

    Args:
        exchange: `exchange(slot, multiplier, factor)` puts the multiplied weight in the weight's place. It is called
            where a function will read the weight again in the backward pass, unseen (inside checkpoints and autograd
            functions), or may write into it; from the next draw on, if the weight has been read otherwise in this one.
    """

    def __init__(self, exchange: Callable[[NoisyWeight, Tensor, float], None]) -> None:
        super().__init__()
        self._exchange = exchange
        self._draws: dict[int, _Draw] = {}
        self._read: set[int] = set()
        self._backward = True
        # Slots that are to be exchanged from the beginning.
        self.unfit: set[str] = set()

    def multiply(self, slot: NoisyWeight, multiplier: Tensor, factor: float) -> None:
        """What a slot's units are multiplied by in this draw."""
        self._draws[id(slot.parameter)] = _Draw(slot, multiplier, factor)

    def start(self, backward: bool = True) -> None:
        """From here on; `backward`: a backward pass will follow."""
        self._backward = backward
        if self._draws:
            super().start()

    def forget(self) -> None:
        """The draw is over."""
        self.stop()
        self._draws.clear()
        self._read.clear()

    def __bool__(self) -> bool:
        return bool(self._draws)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        read = {id(t) for t in tensors_in([args, kwargs])} & self._draws.keys()
        if not read or is_look(func):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        again = self._is_read_again() or name in _APART or property_of(func) == "data"
        for key in read:
            draw = self._draws[key]
            if again:
                self.unfit.add(draw.slot.target.name)
            if again and key not in self._read:
                self._exchange(*self._draws.pop(key))
        self._read |= read
        read &= self._draws.keys()
        if len(read) == 1 and name in _LAYERS and not again:
            (key,) = read
            x, weight, bias, *rest = _arguments(args, kwargs)
            if id(weight) == key and id(x) != key and x.numel() // x.shape[_channels(weight)] < weight[0].numel():
                return self._layer(func, self._draws[key], x, weight, bias, rest, kwargs)
        return func(*self._replaced(args), **self._replaced(kwargs))

    def _is_read_again(self) -> bool:
        """Whether this is within a checkpoint or an autograd function."""
        return self._backward and (not torch.is_grad_enabled() or _saves_are_hooked())

    def _layer(
        self, func: Any, draw: _Draw, x: Tensor, weight: Tensor, bias: Tensor | None, rest: list[Any], kwargs: Any
    ) -> Tensor:
        named = {k: v for k, v in kwargs.items() if k not in ("input", "weight", "bias")}
        output: Tensor = func(x, weight, None, *rest, **named)
        shape = [-1] + [1] * (weight.dim() - 2)
        # In place: no layer here needs its output to go backward.
        output = output.mul_(draw.numbers().reshape(shape).to(output.dtype))
        return output if bias is None else output.add_(bias.reshape(shape).to(output.dtype))

    def _replaced(self, value: Any) -> Any:
        """The same arguments, with products in the place of weights."""
        if isinstance(value, Tensor):
            return value * self._draws[id(value)].numbers() if id(value) in self._draws else value
        if isinstance(value, dict):
            return {k: self._replaced(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            made = [self._replaced(v) for v in value]
            return made if isinstance(value, list) else tuple(made)
        return value


def _saves_are_hooked() -> bool:
    """Whether autograd gives what it saves to others, as checkpoints make it do; in doubt yes."""
    try:
        return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    except (AttributeError, TypeError):
        return True


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Input, weight, bias and what else was given by position to a layer's function."""
    given = list(args)
    for name in ("input", "weight", "bias")[len(given) :]:
        given.append(kwargs.get(name))
    return given


def _channels(weight: Tensor) -> int:
    """The axis of a layer's input along which its channels lie."""
    return -1 if weight.dim() == 2 else 1 - weight.dim()
