"""Multiplied weights in, plain weights out: exact weight noise that costs autograd nothing."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from secateur.core.targets import Targets
from secateur.errors import UsageError
from secateur.regularizers.attachment import Attachment, Hook
from secateur.regularizers.base import WeightNoise

__all__ = ["WeightSwap"]

# Every swap that is attached.
_LIVE: weakref.WeakSet[WeightSwap] = weakref.WeakSet()


class WeightSwap(Attachment):
    """Runs a `WeightNoise` method.

    Before a training forward pass every target's storage is swapped for `weight * multiplier`; a hook on the
    parameter multiplies each gradient alike. The plain weights return before the optimizer steps (after its
    closure, if it is given one), `load_state_dict()`, `after_step` and `remove`, and for the time of an evaluation
    pass or `state_dict()`. Forward passes that share one backward pass share one draw; after a backward pass
    (gradient accumulation) the next forward pass draws anew. An evaluation pass with gradients enabled ends the
    draw for good: run the backward pass of the training forward pass before it.
    """

    def __init__(self, spec: WeightNoise, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed)
        self._noise = spec
        self._plain: dict[str, Tensor] = {}
        self._noisy: dict[str, Tensor] = {}
        self._multipliers: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._lost: list[str] = []
        self._used = self._paused = False
        self._had_hooks = {n: p._backward_hooks is not None for n, p in self.parameters.items()}
        self._hooked: set[str] = set()
        self._refuse_shared()
        self._hook_gradients()
        # Other code reads and writes the weights here: they must be the plain ones.
        self._handles.append(register_optimizer_step_pre_hook(self._before_step))
        self._handles.append(self.network.register_state_dict_pre_hook(Hook(lambda *_: self.pause())))
        self._handles.append(self.network.register_state_dict_post_hook(Hook(lambda *_: self.resume())))
        self._handles.append(self.network.register_load_state_dict_pre_hook(Hook(lambda *_: self.end())))

    def _hook_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter.requires_grad and name not in self._hooked:
                self._hooked.add(name)
                self._handles.append(parameter.register_hook(self._gradient_hook(name)))

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ours = {id(p) for p in self.parameters.values()}
        # Another network's optimizer may step between our forward and backward pass.
        if not any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            return None
        self.end()
        wrapped = (args[0], *(self._then_end(a) if callable(a) else a for a in args[1:]))
        return wrapped, {k: self._then_end(v) if callable(v) else v for k, v in kwargs.items()}

    def _then_end(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            value = closure()
            self.end()
            return value

        return call

    def _refuse_shared(self) -> None:
        """Two swaps of one parameter would each take the other's noisy weights for plain ones."""
        owned = {id(p): name for other in _LIVE for name, p in other.parameters.items()}
        for name, parameter in self.parameters.items():
            if id(parameter) in owned:
                self.remove()
                raise UsageError(
                    f'"{name}" is already under the weight noise of another attached regularizer; '
                    "remove that one first, or give each its own targets"
                )
        _LIVE.add(self)

    def _gradient_hook(self, name: str) -> Any:
        def multiply(gradient: Tensor) -> Tensor:
            self._used = True
            multiplier = self._multipliers.get(name)
            return gradient if multiplier is None else gradient * multiplier

        return multiply

    @torch.no_grad()
    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.resume()
        if self._plain and not self._used:
            return
        self.end()
        self._used = False
        self._hook_gradients()
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
        self._versions = {name: self.parameters[name]._version for name in self._plain}
        # Autocast would otherwise go on using the cast of an earlier draw.
        torch.clear_autocast_cache()

    def end(self) -> None:
        lost = self._restore()
        if lost:
            raise UsageError(
                f'"{lost[0]}" was written to between a training forward pass and the optimizer step, while noise was '
                "in it, so the change is lost; write after the step, and call end() before the step of an "
                "optimizer that is not a torch.optim.Optimizer"
            )

    def _restore(self) -> list[str]:
        """Plain weights for good; the names of those whose noisy stand-in somebody wrote to."""
        self.pause()
        self._plain.clear()
        self._multipliers.clear()
        self._paused = False
        lost, self._lost = self._lost, []
        return lost

    def pause(self) -> None:
        if self._plain and not self._paused:
            self._lost += [n for n, version in self._versions.items() if self.parameters[n]._version != version]
            self._show(self._plain)
            self._paused = True

    def resume(self) -> None:
        if self._paused:
            self._show({name: self._noisy[name] for name in self._plain})
            self._versions = {name: self.parameters[name]._version for name in self._plain}
            self._paused = False

    def _show(self, weights: dict[str, Tensor]) -> None:
        for name, weight in weights.items():
            self.parameters[name].data = weight
        torch.clear_autocast_cache()

    def remove(self) -> None:
        # Not end(): removal must succeed, also while an exception passes by.
        self._restore()
        _LIVE.discard(self)
        super().remove()
        self._noisy.clear()
        for name, parameter in self.parameters.items():
            if not self._had_hooks[name] and not parameter._backward_hooks:
                parameter._backward_hooks = None
