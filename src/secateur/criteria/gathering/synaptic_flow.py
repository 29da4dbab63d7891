"""Synaptic flow: what each weight contributes to the output of the network made positive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.core.targets import Targets
from secateur.criteria.gathering.batches import undisturbed
from secateur.errors import DataError, UsageError

__all__ = ["synaptic_flow"]


def synaptic_flow(network: nn.Module, targets: Targets, inputs: Any) -> dict[str, Tensor]:
    """|w dR/dw| in float64: R is the summed output for one sample of ones, with every tensor of the network absolute.

    The network is called on copies of its tensors, in eval mode, and is not changed.

    Args:
        inputs: a batch of data; only the shape of a sample and the device are used.

    Returns: name -> flow in the parameter's shape; a parameter that R does not depend on is missing.

    Cost: one forward and backward pass for one sample; a float64 copy of the network.

    Reference: Tanaka et al. 2020 (SynFlow), equation 2 and algorithm 1.
    """
    attention = [t.module for t in targets if t.kind == "attention"]
    if attention:
        raise UsageError(
            f'synaptic_flow: layer "{attention[0]}" is attention, which is not linear in its input even when its '
            "weights are positive; exclude attention layers from the targets or choose another criterion"
        )
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        got = f"{inputs.dtype} inputs" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise UsageError(f"synaptic_flow: an input of ones needs batches of one float tensor, got {got}")
    tensors = {
        name: tensor.detach().abs().double() if tensor.is_floating_point() else tensor
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    weights = [tensors[t.name].requires_grad_() for t in targets]
    ones = torch.ones((1, *inputs.shape[1:]), dtype=torch.float64, device=inputs.device)
    with undisturbed(network), torch.enable_grad():
        output = functional_call(network, tensors, (ones,))
        if not isinstance(output, Tensor):
            raise UsageError(f"synaptic_flow: the network gave {type(output).__name__}, expected one tensor; wrap it")
        total = output.sum()
        if not bool(total.isfinite()):
            raise DataError(f"synaptic_flow: the summed output is {float(total)} even in float64; expected a number")
        gradients = torch.autograd.grad(total, weights, allow_unused=True)
    # A layer without weights lets nothing through, rightly; with weights in every layer something else is wrong.
    closed = not any(g is not None and bool(g.any()) for g in gradients)
    if closed and all(bool(w.any()) for w in weights):
        raise DataError(
            "synaptic_flow: nothing flows from the input to the output, so every score would be 0; BatchNorm means "
            "larger than what reaches them close the network: score it before training, or choose another criterion"
        )
    found = zip(targets, weights, gradients, strict=True)
    return {t.name: (w.detach() * g).abs_() for t, w, g in found if g is not None}
