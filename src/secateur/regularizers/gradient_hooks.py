"""Hooks on the gradients of parameters that leave no trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["GradientHooks"]


class GradientHooks:
    """Calls `rule(name, gradient)` for what it returns instead, once a backward pass, before gradients accumulate.

    Args:
        parameters: by name; frozen ones are hooked when `attach` is called after they are thawed.
        rule: must not change the gradient it is given in place.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], rule: Callable[[str, Tensor], Tensor]) -> None:
        self._parameters, self._rule = parameters, rule
        self._handles: dict[str, Any] = {}
        self._had_hooks = {name: p._backward_hooks is not None for name, p in parameters.items()}
        self.attach()

    def attach(self) -> None:
        """Hook every parameter that trains and is not hooked yet."""
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and name not in self._handles:
                self._handles[name] = parameter.register_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[Tensor | None], Tensor | None]:
        # None: this part of the backward pass knows the parameter, but brings it no gradient.
        return lambda gradient: None if gradient is None else self._rule(name, gradient)

    def remove(self) -> None:
        for name, handle in self._handles.items():
            handle.remove()
            parameter = self._parameters[name]
            if not self._had_hooks[name] and not parameter._backward_hooks:
                parameter._backward_hooks = None
        self._handles.clear()
