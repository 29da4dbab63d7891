"""How much gradient reaches the weights: the norm of its mean over the data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from secateur.analysis.layers import layers_of
from secateur.core.masks import Masks
from secateur.core.targets import Targets
from secateur.criteria.driver import gather_evidence
from secateur.criteria.gathering.batches import Batches, Loss
from secateur.errors import DataError, NoEffectError, UnknownNameError, UsageError

__all__ = ["GradientFlow", "gradient_flow"]


@dataclass(frozen=True)
class GradientFlow:
    """L2 norms of the mean gradient.

    Args:
        norm: over all targets' weights together.
        layers: target name -> over its weights alone; their squares sum to that of `norm`.
        weights: how many weights count.
    """

    norm: float
    layers: dict[str, float]
    weights: int


def gradient_flow(
    model: nn.Module,
    batches: Batches,
    *,
    loss: Loss | None = None,
    targets: Targets | None = None,
    masked: bool | Masks = False,
) -> GradientFlow:
    """L2 norm of the gradient of the mean loss over all examples, in eval mode, over the targets' weights.

    Args:
        model: left as it was found (mode, gradients, hooks, requires_grad).
        batches: `(inputs, labels)`, of equal size or not.
        loss: `loss(outputs, labels) -> scalar mean`; default: cross-entropy.
        targets: whose weights; default: every prunable weight. Exclusions are the caller's, explicit.
        masked: False counts the gradients at pruned positions too, which is what stochastic pruning's authors report;
            True leaves out weights that are zero; masks leave out what they remove, of the targets that they cover.

    Raises: `DataError` for no data, a loss or gradient that is not finite; `UsageError` for missing labels, or a layer
        that no gradient reaches.

    Cost: a forward and a backward pass, and one more copy of the gradients.

    Reference: Evci et al. 2022, "Gradient Flow in Sparse Neural Networks" (`masked=True`).

    Examples:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> data = [(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0]]))]
        >>> gradient_flow(net, data, loss=lambda outputs, labels: outputs.sum()).norm
        5.0
    """
    network, targets, parameters = layers_of(model, targets)
    masks = masked if isinstance(masked, Masks) else None
    if masks is not None:
        _check(masks, network, parameters)
    evidence = gather_evidence(network, targets, frozenset({"gradients"}), batches=batches, loss=loss)
    layers, counted = {}, 0
    for name, parameter in parameters.items():
        gradient = evidence[name].gradient
        assert gradient is not None
        if masks is not None and name in masks:
            gradient = gradient[masks[name].to(gradient.device)]
        elif masked is True:
            gradient = gradient[parameter.detach() != 0]
        counted += gradient.numel()
        layers[name] = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        if not math.isfinite(layers[name]):
            raise DataError(f'gradient_flow: the gradient of "{name}" is not finite; expected numbers')
    return GradientFlow(math.hypot(*layers.values()), layers, counted)


def _check(masks: Masks, network: nn.Module, targets: Mapping[str, nn.Parameter]) -> None:
    known = dict(network.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in known:
            raise UnknownNameError("masked parameter", name, known)
        if mask.shape != known[name].shape:
            raise UsageError(
                f'gradient_flow: the mask "{name}" has shape {list(mask.shape)}, expected {list(known[name].shape)}'
            )
    if not masks.keys() & targets.keys():
        raise NoEffectError("gradient_flow: the masks cover none of the targets, so they leave out nothing")
