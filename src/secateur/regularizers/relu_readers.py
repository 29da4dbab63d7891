"""Which outputs ReLUs alone read: what is zero there sends back no gradient, so a mask need not be multiplied again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from secateur.regularizers.quiet_pass import tensors_in
from secateur.regularizers.watch import Watch, is_look

__all__ = ["ReluReaders"]

_RELUS = frozenset(["relu", "relu_"])


class ReluReaders(Watch):
    """Watches one forward pass, between `start` and `stop`, for who reads the tensors it is told to `follow`.

    Sees every torch function and operator, those inside autograd functions too, but not what a scripted function
    does. Holds no tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self._followed: dict[int, tuple[str, weakref.ref[Tensor]]] = {}
        self._read: set[str] = set()
        self._otherwise: set[str] = set()

    def follow(self, name: str, output: Tensor) -> None:
        """Watch `output`, which may be one of several, under `name`."""
        self._followed[id(output)] = (name, weakref.ref(output))

    def found(self) -> frozenset[str]:
        """The names all of whose tensors were read by ReLUs, by nothing else, and are gone."""
        kept = {name for name, output in self._followed.values() if output() is not None}
        return frozenset(self._read - self._otherwise - kept)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        read = [t for t in tensors_in([args, kwargs]) if self._is_followed(t)]
        out = func(*args, **(kwargs or {}))
        for tensor in read:
            name, _ = self._followed[id(tensor)]
            call = getattr(func, "__name__", "")
            if call in _RELUS:
                self._read.add(name)
                if out is tensor:
                    # Overwritten: from here on it is what the ReLU puts out.
                    del self._followed[id(tensor)]
            elif not is_look(func):
                self._otherwise.add(name)
        return out

    def _is_followed(self, tensor: Tensor) -> bool:
        # A new tensor may have the id of one that is gone.
        return id(tensor) in self._followed and self._followed[id(tensor)][1]() is tensor
