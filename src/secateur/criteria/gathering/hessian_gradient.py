"""The Hessian of the loss times its own gradient, without forming the Hessian."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.criteria.gathering.batches import Batches, Loss, finite, labelled, undisturbed
from secateur.errors import UsageError

__all__ = ["differentiates_once", "hessian_gradient"]

_Gradients = tuple[Tensor | None, ...]
_NO_SECOND = "hessian_gradient: a layer of the network has no second derivative ({}); choose another criterion"


def hessian_gradient(
    network: nn.Module, parameters: dict[str, nn.Parameter], batches: Batches, loss: Loss, temperature: float = 1.0
) -> dict[str, Tensor]:
    """H g over all `parameters` together: g and H of the mean loss over all samples, in eval mode.

    Args:
        batches: read twice: first for g, then for H g.
        temperature: what the outputs are divided by before the loss.

    Returns: name -> H g in the parameter's shape; a parameter that no gradient reaches is missing.

    Cost: two forward passes, a backward pass and a double backward pass; two more copies of the parameters.

    Reference: Pearlmutter 1994 (the product); Wang et al. 2020 (GraSP), equation 8.
    """
    tensors = list(parameters.values())

    # The kernels of fused attention have no second derivative; the plain one has.
    with undisturbed(network, tensors), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        gradient = _mean(
            (torch.autograd.grad(value, tensors, allow_unused=True), count)
            for value, count in _losses(network, batches, loss, temperature)
        )
        product = _mean(
            (_directional(value, tensors, gradient), count)
            for value, count in _losses(network, batches, loss, temperature)
        )
    found = zip(parameters, gradient, product, strict=True)
    return {name: torch.zeros_like(g) if hg is None else hg for name, g, hg in found if g is not None}


def _losses(network: nn.Module, batches: Batches, loss: Loss, temperature: float) -> Iterator[tuple[Tensor, int]]:
    seen = 0
    for inputs, labels, count in labelled(batches, "hessian_gradient"):
        outputs = network(inputs)
        if temperature != 1.0:
            if not isinstance(outputs, Tensor):
                raise UsageError(
                    f"hessian_gradient: the network gave {type(outputs).__name__}, expected one tensor of logits to "
                    "divide by the temperature; wrap the network, or use temperature 1"
                )
            outputs = outputs / temperature
        yield finite(loss(outputs, labels), seen), count
        seen += count


def _directional(value: Tensor, tensors: list[nn.Parameter], direction: _Gradients) -> _Gradients:
    """Derivative of the gradient of `value` along `direction`."""
    try:
        # A seed that could be differentiated too: every function that stops at one derivative then shows in the graph.
        seed = torch.ones_like(value, requires_grad=True)
        gradients = torch.autograd.grad(value, tensors, seed, create_graph=True, allow_unused=True)
        along = [(g * d).sum() for g, d in zip(gradients, direction, strict=True) if g is not None and d is not None]
        total = torch.stack(along).sum() if along else value.detach()
        if not total.requires_grad:
            # The loss is linear in every parameter, so that its Hessian is zero.
            return tuple(None for _ in tensors)
        if differentiates_once(total):
            raise UsageError(_NO_SECOND.format("a function marked once_differentiable"))
        return torch.autograd.grad(total, tensors, allow_unused=True)
    except RuntimeError as error:
        if "not implemented" not in str(error) and "double backward" not in str(error):
            raise
        raise UsageError(_NO_SECOND.format(str(error).splitlines()[0])) from error


def differentiates_once(value: Tensor) -> bool:
    """Whether a part of the graph behind `value` would raise if its derivative were asked for."""
    # A gradient that is asked for by name goes round such a part in silence, and would come out wrong.
    stack, seen = [value.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
    return False


def _mean(batches: Iterator[tuple[_Gradients, int]]) -> _Gradients:
    """Mean over samples of what is a mean over each batch."""
    total: list[Tensor | None] = []
    samples = 0
    for gradients, count in batches:
        samples += count
        total = total or [None] * len(gradients)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                weighted, sofar = gradient.detach() * count, total[i]
                total[i] = weighted if sofar is None else sofar.add_(weighted)
    return tuple(None if t is None else t / samples for t in total)
