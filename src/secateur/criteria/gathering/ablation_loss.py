"""The loss of a network that lacks one unit, for every unit: exact, and slow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secateur.core.targets import Target, Targets
from secateur.criteria.gathering.batches import Batches, Loss, finite, labelled, undisturbed
from secateur.criteria.observe import UnitOutputs

__all__ = ["ablation_loss"]


def ablation_loss(network: nn.Module, targets: Targets, batches: Batches, loss: Loss) -> dict[str, Tensor]:
    """Mean loss over all samples, in eval mode, with each unit in turn set to zero, and nothing else changed.

    A unit is set to zero with its bias and, where a BatchNorm follows the layer directly, its scale and shift there.

    Returns: name -> `[units]`, float64.

    Cost: one forward pass over the data for every unit. For small networks only.
    """
    parameters = targets.tensors(network)
    losses = {t.name: torch.zeros(t.units, dtype=torch.float64) for t in targets}
    samples, norms = 0, None
    with undisturbed(network), torch.no_grad():
        for inputs, labels, count in labelled(batches, "ablation_loss"):
            if norms is None:
                watch = UnitOutputs({id(p): n for n, p in parameters.items()}, lambda *_: None)
                with watch:
                    network(inputs)
                norms = watch.norms
            for target in targets:
                for unit in range(target.units):
                    with _without(network, target, unit, norms.get(target.name)):
                        value = finite(loss(network(inputs), labels), samples)
                    losses[target.name][unit] += count * float(value)
            samples += count
    return {name: total / samples for name, total in losses.items()}


@contextmanager
def _without(network: nn.Module, target: Target, unit: int, norm: int | None) -> Iterator[None]:
    weight = network.get_parameter(target.name)
    gone = torch.zeros(target.units, dtype=torch.bool, device=weight.device)
    gone[unit] = True
    per_unit = [network.get_parameter(target.bias)] if target.bias is not None else []
    for module in network.modules() if norm is not None else ():
        if id(getattr(module, "weight", None)) == norm:
            per_unit += [module.weight, module.bias]  # type: ignore[list-item]
            break
    before = [(p, p.detach().clone()) for p in (weight, *per_unit)]
    try:
        weight.masked_fill_(target.spread(gone), 0.0)
        for parameter in per_unit:
            parameter.masked_fill_(gone, 0.0)
        yield
    finally:
        for parameter, value in before:
            parameter.copy_(value)
