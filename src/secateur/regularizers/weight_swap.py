"""Multiplied weights in, plain weights out: exact weight noise that costs autograd nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from secateur.core.targets import Targets
from secateur.regularizers.attachment import Attachment, Hook
from secateur.regularizers.base import WeightNoise

__all__ = ["WeightSwap"]


class WeightSwap(Attachment):
    """Runs a `WeightNoise` method.

    Before a training forward pass every target's storage is swapped for `weight * multiplier`; a hook on the
    parameter multiplies each gradient alike. The plain weights return before the optimizer steps, an
    evaluation pass, `state_dict()`, `after_step` and `remove`. Forward passes that share one backward pass
    share one draw; after a backward pass (gradient accumulation) the next forward pass draws anew.
    """

    def __init__(self, spec: WeightNoise, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed)
        self._noise = spec
        self._plain: dict[str, Tensor] = {}
        self._noisy: dict[str, Tensor] = {}
        self._multipliers: dict[str, Tensor] = {}
        self._used = False
        self._had_hooks = {n: p._backward_hooks is not None for n, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._gradient_hook(name)))
        # Other code reads and writes the weights here: they must be the plain ones.
        self._handles.append(register_optimizer_step_pre_hook(lambda *_: self.end()))
        self._handles.append(self.network.register_state_dict_pre_hook(Hook(lambda *_: self.end())))

    def _gradient_hook(self, name: str) -> Any:
        def multiply(gradient: Tensor) -> Tensor:
            self._used = True
            multiplier = self._multipliers.get(name)
            return gradient if multiplier is None else gradient * multiplier

        return multiply

    @torch.no_grad()
    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._plain and not self._used:
            return
        self.end()
        self._used = False
        for target in self.targets:
            parameter = self.parameters[target.name]
            weight = parameter.detach()
            multiplier = self._noise.multiplier(target, weight, self.stream, self.progress)
            if multiplier is None:
                continue
            self._multipliers[target.name] = multiplier
            self._plain[target.name] = weight
            noisy = self._noisy.get(target.name)
            if noisy is None or noisy.shape != weight.shape:
                noisy = self._noisy[target.name] = torch.empty_like(weight)
            parameter.data = torch.mul(weight, multiplier, out=noisy)
        # Autocast would otherwise go on using the cast of an earlier draw.
        torch.clear_autocast_cache()

    def end(self) -> None:
        if not self._plain:
            return
        for name, weight in self._plain.items():
            self.parameters[name].data = weight
        self._plain.clear()
        self._multipliers.clear()
        torch.clear_autocast_cache()

    def remove(self) -> None:
        super().remove()
        self._noisy.clear()
        for name, parameter in self.parameters.items():
            if not self._had_hooks[name] and not parameter._backward_hooks:
                parameter._backward_hooks = None
