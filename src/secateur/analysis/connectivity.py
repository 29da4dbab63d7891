"""Layers that keep weights, none of which lies on a path from input to output."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.analysis.stability import LayerCollapse
from secateur.core.masks import Masks
from secateur.core.targets import unwrap
from secateur.criteria.gathering.batches import undisturbed
from secateur.errors import UnknownNameError, UsageError

__all__ = ["disconnected_layers"]

_BATCH_NORM = nn.modules.batchnorm._BatchNorm
# What these put out does not say where it came from.
_OPAQUE = (nn.LayerNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm, nn.MultiheadAttention, nn.RNNBase)


def disconnected_layers(model: nn.Module, masks: Masks, inputs: Tensor) -> list[LayerCollapse]:
    """Masked layers that keep weights through which nothing passes: what feeds them, or reads them, is pruned away.

    The network is called on tensors of zeros and ones that say which weights are there: masked ones by their mask,
    others where they are not zero, no biases, and BatchNorm as a scale. Functions that are not 0 at 0, such as sigmoid,
    put out something for nothing, and what reads them counts as connected.

    Args:
        model: left as it was found.
        inputs: a batch; only the shape of a sample and the device are used.

    Raises: `UnknownNameError` or `UsageError` for masks of another network; `UsageError` for networks that paths cannot
        be followed through in this way: attention, recurrence, LayerNorm and its relatives.

    Cost: two forward and backward passes for one sample; float64 copies of the network's tensors.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> first, last = torch.tensor([[True, True], [False, False]]), torch.tensor([[False, True]])
        >>> [c.layer for c in disconnected_layers(net, Masks({"0.weight": first, "2.weight": last}), torch.ones(1, 2))]
        ['0.weight', '2.weight']
    """
    network = unwrap(model)
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in parameters:
            raise UnknownNameError("masked parameter", name, parameters)
        if mask.shape != parameters[name].shape:
            raise UsageError(
                f'disconnected_layers: the mask "{name}" has shape {list(mask.shape)}, expected '
                f"{list(parameters[name].shape)}"
            )
    opaque = [(path, module) for path, module in network.named_modules() if isinstance(module, _OPAQUE)]
    if opaque:
        raise UsageError(
            f'disconnected_layers: paths cannot be followed through "{opaque[0][0]}" ({type(opaque[0][1]).__name__}); '
            "use collapsed_layers"
        )
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise UsageError("disconnected_layers: an input of ones needs a batch as one float tensor")
    sample = torch.ones((1, *inputs.shape[1:]), dtype=torch.float64, device=inputs.device)
    everything = _used(network, {n: torch.ones_like(m) for n, m in masks.items()}, sample)
    for name in masks:
        if not everything[name]:
            raise UsageError(
                f'disconnected_layers: nothing passes "{name}" even with nothing masked, so paths cannot be '
                "followed through this network; use collapsed_layers"
            )
    used = _used(network, masks, sample)
    return [
        LayerCollapse(name, kept, total, "disconnected")
        for name, kept, total in masks.layers()
        if kept and not used[name]
    ]


def _used(network: nn.Module, masks: Mapping[str, Tensor], sample: Tensor) -> dict[str, bool]:
    """Whether any weight that a mask keeps is on a path."""
    there = {n: p.detach() != 0 for n, p in network.named_parameters(remove_duplicate=False) if p.dim() > 1}
    there |= {n: m.to(sample.device) for n, m in masks.items()}
    # Divided by the fan-in, so that nothing overflows however deep the network is.
    tensors = {n: t.double() * (t.shape[0] / max(1, t.numel())) for n, t in there.items()}
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_floating_point() and prefix + leaf not in tensors:
                scale = isinstance(module, _BATCH_NORM) and leaf == "weight"
                ones = leaf == "running_var" or (isinstance(module, nn.PReLU) and leaf == "weight")
                value = (tensor.detach() != 0) if scale else torch.full_like(tensor, float(ones), dtype=torch.float64)
                tensors[prefix + leaf] = value.double()
    weights = {n: tensors[n].requires_grad_() for n in masks}
    with undisturbed(network), torch.enable_grad():
        output = functional_call(network, tensors, (sample,))
        if not isinstance(output, Tensor):
            raise UsageError(f"disconnected_layers: the network gave {type(output).__name__}, expected one tensor")
        if not output.requires_grad:
            return dict.fromkeys(masks, False)
        gradients = torch.autograd.grad(output.sum(), list(weights.values()), allow_unused=True)
    found = zip(masks, weights.values(), gradients, strict=True)
    return {n: g is not None and bool((w.detach() * g).any()) for n, w, g in found}
