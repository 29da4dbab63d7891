"""Multiplied weights in, plain weights out: exact weight noise that costs autograd nothing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from secateur.core.targets import Targets
from secateur.errors import UsageError
from secateur.regularizers import noisy_weight
from secateur.regularizers.attachment import Attachment, Hook
from secateur.regularizers.base import WeightNoise
from secateur.regularizers.noisy_units import NoisyUnits, is_per_unit
from secateur.regularizers.noisy_weight import NoisyWeight
from secateur.regularizers.watch import can_watch

__all__ = ["WeightSwap"]

# Every swap that is attached.
_LIVE: weakref.WeakSet[WeightSwap] = weakref.WeakSet()


def _broadcasts(shape: torch.Size, onto: torch.Size) -> bool:
    """Whether a tensor of `shape` broadcasts against one of `onto` without making it larger."""
    missing = len(onto) - len(shape)
    return missing >= 0 and all(one in (1, other) for one, other in zip(shape, onto[missing:], strict=True))


class WeightSwap(Attachment):
    """Runs a `WeightNoise` method.

    Before a training forward pass every target's storage is swapped for `weight * multiplier`; a hook on the
    parameter multiplies each gradient alike. The plain weights return before the optimizer steps (after its
    closure, if it is given one), `load_state_dict()`, `after_step` and `remove`, and for the time of an evaluation
    pass or `state_dict()`. Forward passes that share one backward pass share one draw; after a backward pass
    (gradient accumulation) the next forward pass draws anew. An evaluation pass with gradients enabled ends the
    draw for good: run the backward pass of the training forward pass before it.

    Memory: the multiplied weights, kept from step to step, and what they were multiplied by during a draw. Units of
    large Linear and convolution layers that get one number each are multiplied while the forward pass runs instead, in
    their outputs where these are fewer than the weights, at no copy; not in compiled, scripted or `DataParallel`
    networks, nor in checkpoints and autograd functions. Outside the forward pass these weights are plain.
    """

    def __init__(self, spec: WeightNoise, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed)
        self._noise = spec
        self._slots = [NoisyWeight(t, self.parameters[t.name]) for t in self.targets]
        self._ids = {id(p) for p in self.parameters.values()}
        # The slots of the present draw.
        self._swapped: list[NoisyWeight] = []
        # The others of the present draw.
        self._running = NoisyUnits(self._exchange)
        self._lost: list[str] = []
        self._used = self._paused = False
        self._refuse_shared()
        self._hook_gradients()
        # Other code reads and writes the weights here: they must be the plain ones.
        self._handles.append(register_optimizer_step_pre_hook(self._before_step))
        self._handles.append(self.network.register_state_dict_pre_hook(Hook(lambda *_: self.pause())))
        self._handles.append(self.network.register_state_dict_post_hook(Hook(lambda *_: self.resume())))
        self._handles.append(self.network.register_load_state_dict_pre_hook(Hook(lambda *_: self.end())))

    def _hook_gradients(self) -> None:
        for slot in self._slots:
            self._handles += slot.hook(self._note_used)

    def _note_used(self) -> None:
        self._used = True

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Another network's optimizer may step between our forward and backward pass.
        if not any(id(p) in self._ids for group in optimizer.param_groups for p in group["params"]):
            return None
        self.end()
        if len(args) == 1 and not kwargs:
            return None
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

    @torch.no_grad()
    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.resume()
        if (self._swapped or self._running) and not self._used:
            self._running.start(backward=not self.is_sampling)
            return
        self.end()
        can_run = can_watch(self.model)
        self._used = False
        self._hook_gradients()
        for slot in self._slots:
            made = self._noise.multiplier(slot.target, slot.parameter.detach(), self.stream, self.progress)
            if made is None:
                continue
            multiplier, factor = made if isinstance(made, tuple) and len(made) == 2 else (made, 1.0)
            if not slot.checked:
                self._check(slot, multiplier, factor)
            if can_run and self._runs(slot, multiplier):
                self._running.multiply(slot, multiplier, factor)
            else:
                slot.swap(multiplier, factor)
                self._swapped.append(slot)
        # Autocast would otherwise go on using the cast of an earlier draw.
        torch.clear_autocast_cache()
        self._running.start(backward=not self.is_sampling)

    def _runs(self, slot: NoisyWeight, multiplier: Tensor) -> bool:
        """Whether the slot's units are multiplied while the forward pass runs."""
        target = slot.target
        return (
            target.numel > noisy_weight.SMALL
            and target.kind in ("linear", "conv", "attention")
            and target.name not in self._running.unfit
            and is_per_unit(multiplier, slot.parameter)
        )

    @torch.no_grad()
    def _exchange(self, slot: NoisyWeight, multiplier: Tensor, factor: float) -> None:
        slot.swap(multiplier, factor)
        self._swapped.append(slot)
        torch.clear_autocast_cache()

    def _check(self, slot: NoisyWeight, multiplier: Any, factor: Any) -> None:
        """Whether they can be multiplied with; for a target's first draw only, because looking takes time."""
        what = f'{type(self._noise).__name__}.multiplier for "{slot.target.name}"'
        if not isinstance(multiplier, Tensor):
            raise UsageError(f"{what} returned a {type(multiplier).__name__}, expected a tensor, or None for no change")
        if not _broadcasts(multiplier.shape, slot.parameter.shape):
            raise UsageError(
                f"{what} returned shape {list(multiplier.shape)}, expected one that broadcasts against the weight's, "
                f"{list(slot.parameter.shape)}: target.unrows for a number per weight, target.spread for one per unit"
            )
        if factor != 1.0 and (multiplier.dtype is not torch.bool or not isinstance(factor, int | float)):
            raise UsageError(
                f"{what} returned {multiplier.dtype} and a {type(factor).__name__}, expected bools (True: kept) and "
                "the number that what is kept is multiplied by, or one tensor"
            )
        if not math.isfinite(factor) or not bool(multiplier.isfinite().all()):
            raise UsageError(f"{what} returned numbers that are not finite; expected 0 for what is dropped")
        slot.checked = True

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
        self._running.forget()
        if not self._swapped:
            return []
        self.pause()
        for slot in self._swapped:
            slot.forget()
        self._swapped.clear()
        self._paused = False
        lost, self._lost = self._lost, []
        return lost

    def pause(self) -> None:
        self._running.stop()
        if not self._swapped or self._paused:
            return
        for slot in self._swapped:
            if not slot.show_plain():
                self._lost.append(slot.target.name)
        self._paused = True
        torch.clear_autocast_cache()

    def resume(self) -> None:
        self._running.stop()
        if not self._paused:
            return
        for slot in self._swapped:
            slot.show_noisy()
        self._paused = False
        torch.clear_autocast_cache()

    def remove(self) -> None:
        # Not end(): removal must succeed, also while an exception passes by.
        self._restore()
        _LIVE.discard(self)
        super().remove()
        for slot in self._slots:
            slot.release()
