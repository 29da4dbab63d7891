"""Large layers under noise of their units: multiplied while they run, so that no second weight is kept for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.core.targets import Target, Targets
from secateur.regularizers.attachment import Hook
from secateur.regularizers.layers import unsupported
from secateur.regularizers.quiet_pass import quiet_pass, tensors_in
from secateur.regularizers.stream import as_numbers
from secateur.regularizers.substitute import multiply_units
from secateur.regularizers.unit_sites import own_site

__all__ = ["NoisyUnits", "read_by_their_layer_alone"]


class NoisyUnits:
    """A target whose layer's units are multiplied while it runs; its bias is not. The weight stays as it is."""

    def __init__(self, target: Target, layer: nn.Module) -> None:
        self.target = target
        self._factor: Tensor | None = None
        self._shown = False
        axis = own_site(target).axis
        self.handles: list[Any] = multiply_units(
            layer, target, axis, lambda _: self._factor if self._shown else None, with_bias=False
        )

    def swap(self, multiplier: Tensor, factor: float, weight: Tensor) -> None:
        """Multiply from now on by `multiplier * factor`, one number for each unit."""
        numbers = as_numbers(multiplier, weight.dtype) if multiplier.dtype is torch.bool else multiplier
        self._factor = numbers.to(weight.dtype).flatten() * factor
        self._shown = True

    def show_plain(self) -> bool:
        """Stop for a while; whether the weight has been left alone meanwhile, which does not matter here."""
        self._shown = False
        return True

    def show_noisy(self) -> None:
        """Go on."""
        self._shown = True

    def forget(self) -> None:
        """The draw is over."""
        self._factor = None


def read_by_their_layer_alone(
    network: nn.Module, targets: Targets, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> set[str]:
    """Targets whose layer is a plain one, and whose weight nothing reads but that layer when it is called.

    Runs `network` once in eval mode without gradients on `args` and `kwargs`. Where that fails none is sure.
    """
    odd = unsupported(network, targets).keys()
    plain = [t for t in targets if t.name not in odd and not t.aliases]
    readers = _Readers({id(network.get_parameter(t.name)): t.name for t in plain})
    try:
        with quiet_pass(network), readers.watching(network, plain), readers:
            network.forward(*args, **kwargs)
    except Exception:
        # If something is wrong with the call, the training pass that follows says so.
        return set()
    return readers.called - readers.elsewhere


class _Readers(TorchFunctionMode):
    """`called`: targets whose layer was called; `elsewhere`: those whose weight was read outside of such a call."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.called: set[str] = set()
        self.elsewhere: set[str] = set()
        self._names = names
        self._inside: str | None = None

    @contextmanager
    def watching(self, network: nn.Module, targets: list[Target]) -> Iterator[None]:
        """Within the block the targets' layers tell when they are called."""

        def enter(name: str) -> None:
            self.called.add(name)
            self._inside = name

        def leave() -> None:
            self._inside = None

        handles: list[Any] = []
        for target in targets:
            layer = network.get_submodule(target.module)
            handles.append(layer.register_forward_pre_hook(Hook(lambda *_, name=target.name: enter(name))))
            handles.append(layer.register_forward_hook(Hook(lambda *_: leave()), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        read = {self._names[id(t)] for t in tensors_in([args, kwargs]) if id(t) in self._names} - {self._inside}
        # Its shape and the like may be looked at.
        if read and (out is None or next(tensors_in(out), None) is not None):
            self.elsewhere |= {name for name in read if name is not None}
        return out
