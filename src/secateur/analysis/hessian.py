"""What taking weights away does to the loss, to second order, by Hessian-vector products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.analysis.second_order import derivative, gradient_graph, losses, twice
from secateur.core.masks import Masks
from secateur.core.targets import unwrap
from secateur.criteria.gathering.batches import Batches, Loss
from secateur.errors import DataError, NoEffectError, UnknownNameError, UsageError

__all__ = ["HessianForm", "hessian_form"]


@dataclass(frozen=True)
class HessianForm:
    """The loss around the weights w, along a change to w - d: L(w - d) - L(w) is about -g^T d + d^T H d / 2.

    Args:
        slope: g^T d.
        value: d^T H d.
        layers: name -> d_i^T (H d)_i, which sum to `value`.
        pairs: (name, name) -> d_i^T H_ij d_j, if asked for; they sum to `layers` and to `value`.
    """

    slope: float
    value: float
    layers: dict[str, float]
    pairs: dict[tuple[str, str], float] | None = None

    @property
    def loss_change(self) -> float:
        """-g^T d + d^T H d / 2; its size is the error that targeted dropout's authors bound."""
        return 0.5 * self.value - self.slope


def hessian_form(
    model: nn.Module,
    batches: Batches,
    removed: Masks | Mapping[str, Tensor],
    *,
    loss: Loss | None = None,
    pairs: bool = False,
) -> HessianForm:
    """g^T d and d^T H d for the weights d that are taken away, of the mean loss over all samples, in eval mode.

    Args:
        model: left as it was found.
        batches: `(inputs, labels)`, of equal size or not; read once.
        removed: masks: d is the weights that they remove; or parameter name -> d, shaped like the parameter.
        loss: `loss(outputs, labels) -> scalar mean`; default: cross-entropy.
        pairs: split d^T H d into pairs of layers too.

    Raises: `NoEffectError` where d is zero; `UsageError` for a layer that no gradient reaches, that has no second
        derivative, or a d of another shape; `DataError` for no data, a loss or product that is not finite.

    Cost: a forward, a backward and a double backward pass; with `pairs` one double backward pass for each layer.

    Reference: Pearlmutter 1994 (the product); targeted dropout, section on the dependence between weights.

    Examples:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> d = {"weight": torch.tensor([[2.0]])}
        >>> data = [(torch.tensor([[3.0]]), torch.tensor([[0.0]]))]
        >>> hessian_form(net, data, d, loss=nn.functional.mse_loss).value
        72.0
    """
    network = unwrap(model)
    change = _change(network, removed)
    parameters = {name: network.get_parameter(name) for name in change}
    tensors, parts = list(parameters.values()), list(change.values())
    alone: list[list[Tensor | None]] = [[d if i == j else None for j, d in enumerate(parts)] for i in range(len(parts))]
    directions = alone if pairs else [list[Tensor | None](parts)]
    table = torch.zeros(len(parts), len(directions), dtype=torch.float64)
    slope, samples = 0.0, 0
    with twice(network, tensors):
        for value, count in losses(network, batches, loss):
            gradient = gradient_graph(value, parameters)
            slope += count * sum(_dot(g, d) for g, d in zip(gradient, parts, strict=True))
            for column, direction in enumerate(directions):
                along = torch.stack([(g * d).sum() for g, d in zip(gradient, direction, strict=True) if d is not None])
                for row, product in enumerate(derivative(along.sum(), tensors)):
                    if product is not None:
                        table[row, column] += count * _dot(product, parts[row])
            samples += count
    table /= samples
    if not bool(table.isfinite().all()):
        raise DataError("hessian_form: the product with the Hessian is not finite; expected numbers")
    layers = dict(zip(change, table.sum(1).tolist(), strict=True))
    split = {(a, b): float(table[i, j]) for i, a in enumerate(change) for j, b in enumerate(change)} if pairs else None
    return HessianForm(slope / samples, float(table.sum()), layers, split)


def _change(network: nn.Module, removed: Masks | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """d by parameter name, of the parameters where it is not zero."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for name, given in removed.items():
        if name not in parameters:
            raise UnknownNameError("parameter", name, parameters)
        weight = parameters[name].detach()
        if given.shape != weight.shape:
            raise UsageError(
                f'hessian_form: what is removed from "{name}" has shape {list(given.shape)}, '
                f"expected {list(weight.shape)}"
            )
        given = given.to(weight.device)
        d = weight.masked_fill(given, 0.0) if isinstance(removed, Masks) else given.to(weight.dtype)
        if not bool(d.isfinite().all()):
            raise DataError(f'hessian_form: what is removed from "{name}" is not finite; expected numbers')
        if bool(d.any()):
            found[name] = d
    if not found:
        raise NoEffectError("hessian_form: nothing is removed, so d^T H d is 0; give masks that remove weights")
    return found


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() * b.double()).sum())
