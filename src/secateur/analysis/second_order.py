"""Derivatives of gradients, of a network that is left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.criteria.gathering.batches import Batches, Loss, finite, labelled, undisturbed
from secateur.criteria.gathering.hessian_gradient import differentiates_once
from secateur.errors import UsageError

__all__ = ["derivative", "gradient_graph", "losses", "twice"]

_NO_SECOND = "second derivatives: a layer of the network has none ({}); replace it, or leave it out of the loss"


@contextmanager
def twice(network: nn.Module, tensors: list[nn.Parameter]) -> Iterator[None]:
    """Two derivatives can be taken of what the network computes within the block."""
    # The kernels of fused attention have no second derivative; the plain one has.
    with undisturbed(network, tensors), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            yield
        except RuntimeError as error:
            if "not implemented" not in str(error) and "double backward" not in str(error):
                raise
            raise UsageError(_NO_SECOND.format(str(error).splitlines()[0])) from error


def losses(network: nn.Module, batches: Batches, loss: Loss | None) -> Iterator[tuple[Tensor, int]]:
    """(mean loss, samples) of every batch."""
    seen, loss = 0, loss or nn.functional.cross_entropy
    for inputs, labels, count in labelled(batches, "second derivatives"):
        yield finite(loss(network(inputs), labels), seen), count
        seen += count


def gradient_graph(value: Tensor, parameters: dict[str, nn.Parameter]) -> list[Tensor]:
    """The gradient of `value`, to be differentiated again."""
    if not value.requires_grad:
        raise UsageError("second derivatives: the loss depends on no weight; is a part of the network under no_grad?")
    # A seed that could be differentiated too: every function that stops at one derivative then shows in the graph.
    seed = torch.ones_like(value, requires_grad=True)
    gradient = torch.autograd.grad(value, list(parameters.values()), seed, create_graph=True, allow_unused=True)
    for name, part in zip(parameters, gradient, strict=True):
        if part is None:
            raise UsageError(f'second derivatives: no gradient reaches "{name}"; leave it out')
        if not part.requires_grad:
            raise UsageError(_NO_SECOND.format("a function whose gradient is a constant to autograd"))
    found = [part for part in gradient if part is not None]
    if differentiates_once(torch.stack([part.sum() for part in found])):
        raise UsageError(_NO_SECOND.format("a function marked once_differentiable"))
    return found


def derivative(value: Tensor, tensors: list[nn.Parameter]) -> list[Tensor | None]:
    """The derivative of a number made of the gradient; None where it is zero."""
    return list(torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True))
