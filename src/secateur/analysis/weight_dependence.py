"""Which pairs of weights the loss depends on together, for small networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.analysis.layers import layers_of
from secateur.analysis.second_order import derivative, gradient_graph, losses, twice
from secateur.core.targets import Targets
from secateur.criteria.gathering.batches import Batches, Loss
from secateur.errors import DataError, UnknownNameError, UsageError

__all__ = ["WeightDependence", "weight_dependence"]


@dataclass(frozen=True)
class WeightDependence:
    """Which weights the loss depends on together.

    Args:
        matrix: `[weights, weights]`, float64 on the CPU: w_i H_ij w_j.
        slices: target name -> the rows, and columns, of its weights in their own order.
    """

    matrix: Tensor
    slices: dict[str, slice]

    def between(self, a: str, b: str) -> Tensor:
        """The block of two layers."""
        for name in (a, b):
            if name not in self.slices:
                raise UnknownNameError("layer", name, self.slices)
        return self.matrix[self.slices[a], self.slices[b]]


def weight_dependence(
    model: nn.Module,
    batches: Batches,
    *,
    loss: Loss | None = None,
    targets: Targets | None = None,
    limit: int = 2000,
) -> WeightDependence:
    """The matrix w_i H_ij w_j over the targets' weights, of the mean loss over all samples, in eval mode.

    Args:
        model: left as it was found. A small one.
        batches: `(inputs, labels)`; read once.
        loss: `loss(outputs, labels) -> scalar mean`; default: cross-entropy.
        targets: whose weights; default: every prunable weight.
        limit: the most weights that are accepted; the matrix takes 8 bytes for each pair.

    Raises: as `hessian_form`; `UsageError` for more weights than `limit`.

    Cost: a double backward pass for each weight that is not zero, and batch.

    Reference: targeted dropout, section on the dependence between weights.
    """
    network, _, parameters = layers_of(model, targets)
    tensors = list(parameters.values())
    size = sum(p.numel() for p in tensors)
    if size > limit:
        raise UsageError(
            f"weight_dependence: {size} weights make a matrix of {size} x {size}, the limit is {limit}; give fewer "
            "targets, raise limit=, or use hessian_form"
        )
    weights = torch.cat([p.detach().flatten() for p in tensors])
    rows = weights.nonzero().flatten().tolist()
    matrix, samples = torch.zeros(size, size, dtype=torch.float64, device=weights.device), 0
    with twice(network, tensors):
        for value, count in losses(network, batches, loss):
            gradient = torch.cat([g.flatten() for g in gradient_graph(value, parameters)])
            for row in rows:
                found = zip(derivative(gradient[row], tensors), tensors, strict=True)
                matrix[row] += count * torch.cat(
                    [(torch.zeros_like(p) if h is None else h).flatten() for h, p in found]
                )
            samples += count
    matrix *= weights[:, None].double() * weights / samples
    if not bool(matrix.isfinite().all()):
        raise DataError("weight_dependence: second derivatives are not finite; expected numbers")
    ends = torch.tensor([0, *(p.numel() for p in tensors)]).cumsum(0).tolist()
    return WeightDependence(matrix.cpu(), {n: slice(ends[i], ends[i + 1]) for i, n in enumerate(parameters)})
