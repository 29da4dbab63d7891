"""Penalties at work: L1 in the graph, and irrelevance regularization in gradient hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.duration import Progress
from secateur.core.targets import Targets
from secateur.errors import NoEffectError
from secateur.regularizers.attachment import Attachment
from secateur.regularizers.gradient_hooks import GradientHooks
from secateur.regularizers.irrelevance import Irrelevance
from secateur.regularizers.l1 import L1

__all__ = ["IrrelevanceTerm", "L1Penalty"]


class L1Penalty(Attachment):
    """factor times the L1 norm of the targets, as a term of the loss."""

    def __init__(self, spec: L1, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed)
        self._l1 = spec

    def penalty(self) -> Tensor | float:
        if not self._l1.factor:
            return 0.0
        self._refuse_replaced()
        # Not a norm function: that is slower, and adds millions of single-precision terms with a large error.
        norms = [p.abs() for p in self.parameters.values()]
        by_tensor = [n.mean() if self._l1.reduction == "mean_per_tensor" else n.sum() for n in norms]
        return self._l1.factor * torch.stack(by_tensor).sum()


class IrrelevanceTerm(Attachment):
    """Adds 2 factor exp(-|g|) w to every target's gradient g, for each backward pass that `penalty()` is part of."""

    def __init__(self, spec: Irrelevance, model: nn.Module, targets: Targets | None, seed: int) -> None:
        super().__init__(spec, model, targets, seed)
        self._irrelevance = spec
        self._hooks = GradientHooks(self.parameters, self._add)
        # By target: minus the inverse of the loss's scale, and the factor of the term.
        self._pending: dict[str, tuple[Tensor, Tensor]] = {}
        self._added = False

    def penalty(self) -> Tensor | float:
        trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        if not self._irrelevance.factor or not trained:
            return 0.0
        self._refuse_replaced()
        self._hooks.attach()
        zero: Tensor = _Scale.apply(lambda scale: self._expect(list(trained), scale), *trained.values())
        return zero

    def _expect(self, names: list[str], scale: Tensor) -> None:
        inverse = torch.where(scale == 0, 0.0, -1.0 / scale.abs())
        self._pending = dict.fromkeys(names, (inverse, 2.0 * self._irrelevance.factor * scale))
        # A layer that this backward pass does not reach must not take the term in a later one.
        torch.autograd.Variable._execution_engine.queue_callback(self._pending.clear)

    def _add(self, name: str, gradient: Tensor) -> Tensor:
        if name not in self._pending:
            return gradient
        inverse, factor = self._pending.pop(name)
        self._added = True
        term = gradient.detach().abs().mul_(inverse).exp_()
        return gradient + term.mul_(self.parameters[name].detach()).mul_(factor)

    def after_step(self, progress: Progress) -> None:
        super().after_step(progress)
        trained = any(p.requires_grad for p in self.parameters.values())
        if self._irrelevance.factor and trained and not self._added:
            raise NoEffectError(
                "irrelevance: no gradient was regularized since the last step; add penalty() to the loss (its value "
                "is 0, but it tells which backward passes to act in)"
            )
        self._added = False

    def remove(self) -> None:
        super().remove()
        self._pending.clear()
        self._hooks.remove()


class _Scale(torch.autograd.Function):
    """Zero; its backward pass tells what the loss is multiplied by, before the hooks of `parameters` run.

    Loss scaling and the 1/n of gradient accumulation multiply all gradients alike, and the exponential must not see
    them. The parameters are inputs because autograd then waits for this function before it runs their hooks.
    """

    @staticmethod
    def forward(ctx: Any, tell: Callable[[Tensor], None], *parameters: Tensor) -> Tensor:
        ctx.tell, ctx.inputs = tell, 1 + len(parameters)
        dtype = torch.promote_types(parameters[0].dtype, torch.float32)
        return torch.zeros((), dtype=dtype, device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[None, ...]:
        ctx.tell(scale[0])
        return (None,) * ctx.inputs
