"""One parameter under weight noise: its plain weight, the stand-in, and what its gradient is multiplied by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from secateur.core.targets import Target
from secateur.regularizers.packed_mask import PackedMask
from secateur.regularizers.stream import as_numbers

__all__ = ["NoisyWeight"]

# Up to so many weights a copy more is nothing, and one plain product is quicker than what avoids it.
SMALL = 1 << 16


def _is_alone(tensor: Tensor) -> bool:
    """Whether no other tensor shares its memory; in doubt not."""
    try:
        # Referred to by the tensor and by the storage object made here.
        return bool(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) <= 2)
    except AttributeError:
        return False


class _Backward:
    """The backward pass that runs now."""

    def __init__(self) -> None:
        self._answer = (-1, False)

    def accumulates(self, parameter: nn.Parameter) -> bool:
        """Whether gradients go into `.grad`, and are not those that `torch.autograd.grad` returns; in doubt not."""
        try:
            task = torch._C._current_graph_task_id()
            if task == self._answer[0]:
                # Asking takes as long as multiplying a small layer; in one pass the answer is the same for all.
                return self._answer[1]
            # What torch's own register_multi_grad_hook asks; within torch.autograd.grad it is refused.
            answer = bool(torch._C._will_engine_execute_node(get_gradient_edge(parameter).node))
        except AttributeError:
            return False
        except RuntimeError:
            answer = False
        self._answer = (task, answer)
        return answer


_BACKWARD = _Backward()


class NoisyWeight:
    """A target's parameter, its plain weight, and the noisy one that stands in for it during a draw."""

    def __init__(self, target: Target, parameter: nn.Parameter) -> None:
        self.target, self.parameter = target, parameter
        self.checked = False
        self._had_hooks = parameter._backward_hooks is not None
        self._hook: Any = None
        # The gradient on its way to `parameter.grad` is to be multiplied there.
        self._in_grad = False
        self._multiplier: Tensor | PackedMask | None = None
        self._plain: Tensor | None = None
        self._noisy: Tensor | None = None
        self._version = 0

    def hook(self, used: Callable[[], None]) -> list[Any]:
        """Multiply its gradients from now on, if it trains and is not hooked yet; `used` is called for each one."""
        if self._hook is not None or not self.parameter.requires_grad:
            return []

        def multiply(gradient: Tensor | None) -> Tensor | None:
            used()
            return self._on_its_way(gradient)

        self._hook = self.parameter.register_hook(multiply)
        if self.parameter.numel() <= SMALL:
            return [self._hook]
        return [self._hook, self.parameter.register_post_accumulate_grad_hook(self._arrived)]

    def _on_its_way(self, gradient: Tensor | None) -> Tensor | None:
        if gradient is None or self._multiplier is None:
            return gradient
        # A product of its own would be one more copy of the largest layer, when all gradients are there already.
        self._in_grad = gradient.numel() > SMALL and self._will_be_grad(gradient)
        return gradient if self._in_grad else self._product(gradient)

    def _will_be_grad(self, gradient: Tensor) -> bool:
        """Whether it goes into `parameter.grad`, with nothing in there yet, and no other hook sees it on its way."""
        parameter: Any = self.parameter
        if parameter.grad is not None or gradient.requires_grad or gradient.layout is not torch.strided:
            return False
        if next(reversed(parameter._backward_hooks)) != self._hook.id or len(parameter._post_accumulate_grad_hooks) > 1:
            return False
        return _BACKWARD.accumulates(parameter)

    def _arrived(self, parameter: nn.Parameter) -> None:
        gradient = parameter.grad
        if not self._in_grad or gradient is None:
            return
        self._in_grad = False
        if not _is_alone(gradient):
            parameter.grad = self._product(gradient)
        elif isinstance(self._multiplier, PackedMask):
            self._multiplier.multiply_(gradient)
        else:
            gradient.mul_(self._multiplier)  # type: ignore[arg-type]

    def _product(self, gradient: Tensor) -> Tensor:
        multiplier: Any = self._multiplier
        if not isinstance(multiplier, PackedMask):
            return gradient * multiplier
        if gradient.requires_grad or gradient.layout is not torch.strided:
            return gradient * multiplier.dense(gradient.dtype)
        product = gradient.clone()
        multiplier.multiply_(product)
        return product

    def swap(self, multiplier: Tensor, factor: float = 1.0) -> None:
        """Put `weight * multiplier * factor` in the weight's place."""
        weight = self.parameter.detach()
        noisy = self._noisy
        if noisy is None or noisy.shape != weight.shape or noisy.dtype != weight.dtype:
            noisy = self._noisy = torch.empty_like(weight)
        if multiplier.dtype is torch.bool and multiplier.shape == weight.shape and weight.numel() > SMALL:
            noisy.copy_(multiplier.view(torch.uint8))
            if factor != 1.0:
                # As the type of the weights has it, forward and backward.
                factor = float(torch.tensor(factor, dtype=weight.dtype))
                noisy.mul_(factor)
            noisy.mul_(weight)
            self._multiplier = PackedMask(multiplier, factor)
        else:
            # Gradients keep their type.
            numbers = as_numbers(multiplier, weight.dtype) if multiplier.dtype is torch.bool else multiplier
            numbers = numbers.to(weight.dtype) if numbers.is_floating_point() else numbers
            self._multiplier = numbers if factor == 1.0 else numbers * factor
            torch.mul(weight, self._multiplier, out=noisy)
        self._plain = weight
        self.show_noisy()

    @property
    def multiplier(self) -> Tensor | None:
        """What the weight is multiplied by in this draw, as numbers; a copy."""
        found = self._multiplier
        if isinstance(found, PackedMask):
            return found.dense(self.parameter.dtype)
        return None if found is None else found.clone()

    def show_plain(self) -> bool:
        """Put the plain weight in its place; whether the noisy one is as it was put there."""
        untouched = self.parameter._version == self._version
        self.parameter.data = self._plain  # type: ignore[assignment]
        return untouched

    def show_noisy(self) -> None:
        """Put the noisy weight in its place."""
        self.parameter.data = self._noisy  # type: ignore[assignment]
        self._version = self.parameter._version

    def forget(self) -> None:
        """The draw is over."""
        self._plain = self._multiplier = None

    def release(self) -> None:
        """Leave no trace in the parameter, once the hooks are gone."""
        self._noisy = None
        parameter: Any = self.parameter
        if not self._had_hooks and not parameter._backward_hooks:
            parameter._backward_hooks = None
        if not parameter._post_accumulate_grad_hooks:
            parameter._post_accumulate_grad_hooks = None
