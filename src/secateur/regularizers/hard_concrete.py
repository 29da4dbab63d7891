"""Hard-concrete gates: the distribution, and its use on every weight of a layer without copies of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from secateur.regularizers.noisy_weight import SMALL
from secateur.regularizers.pieces import pieces, total
from secateur.regularizers.seeded import logistic_like

__all__ = ["expected_open", "gated_weight", "hard_concrete", "keep_probability"]

# The hard-concrete distribution of the paper: temperature, and the interval a gate is stretched to.
_BETA, _LOW, _HIGH = 2.0 / 3.0, -0.1, 1.1
_SHIFT = _BETA * math.log(-_LOW / _HIGH)


def keep_probability(log_alpha: Tensor) -> Tensor:
    """Probability that a hard-concrete gate is not zero.

    Examples:
        >>> keep_probability(torch.tensor([-3.0, 0.0, 3.0]))
        tensor([0.1976, 0.8318, 0.9900])
    """
    return torch.sigmoid(log_alpha - _SHIFT)


def hard_concrete(log_alpha: Tensor, logistic: Tensor | None = None) -> Tensor:
    """A hard-concrete gate in [0, 1].

    Args:
        log_alpha: location.
        logistic: noise of the standard logistic distribution; None for the gate of evaluation.

    Examples:
        >>> hard_concrete(torch.tensor([-3.0, -2.0, 0.0, 3.0]))
        tensor([0.0000, 0.0430, 0.5000, 1.0000])
    """
    s = torch.sigmoid(log_alpha if logistic is None else (logistic + log_alpha) / _BETA)
    return (s * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)


def _slope(s: Tensor, gate: Tensor) -> Tensor:
    """Derivative of a drawn gate by log_alpha; `s` is its sigmoid."""
    inside = gate == s * (_HIGH - _LOW) + _LOW
    return s * (1.0 - s) * ((_HIGH - _LOW) / _BETA) * inside


def gated_weight(weight: Tensor, log_alpha: Tensor, seed: Tensor) -> Tensor:
    """`weight * hard_concrete(log_alpha, logistic_like(log_alpha, seed))`; of a large layer no more is kept."""
    if weight.numel() <= SMALL:
        return weight * hard_concrete(log_alpha, logistic_like(log_alpha, seed))
    gated: Tensor = _GatedWeight.apply(weight, log_alpha, seed)
    return gated


def expected_open(log_alpha: Tensor) -> Tensor:
    """The sum of `keep_probability(log_alpha)`; of a large layer no probabilities are kept."""
    if log_alpha.numel() <= SMALL:
        return keep_probability(log_alpha).sum()
    number: Tensor = _ExpectedOpen.apply(log_alpha)
    return number


class _GatedWeight(torch.autograd.Function):
    """The noise is made again in the backward pass: with what autograd keeps of each step of the formula, it would be
    four copies of the weights."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_alpha: Tensor, seed: Tensor) -> Tensor:
        ctx.save_for_backward(weight, log_alpha, seed)
        gated = logistic_like(log_alpha, seed)
        for w, a, z in pieces(weight, log_alpha, gated):
            z.add_(a).div_(_BETA).sigmoid_().mul_(_HIGH - _LOW).add_(_LOW).clamp_(0.0, 1.0).mul_(w)
        return gated

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, log_alpha, seed = ctx.saved_tensors
        noise = logistic_like(log_alpha, seed)
        if torch.is_grad_enabled():
            # Somebody wants derivatives of these in turn.
            s, gate = torch.sigmoid((noise + log_alpha) / _BETA), hard_concrete(log_alpha, noise)
            return gradient * gate, gradient * weight * _slope(s, gate), None
        of_weight = torch.empty_like(weight)
        for w, a, g, dw, s in pieces(weight, log_alpha, gradient, of_weight, noise):
            s.add_(a).div_(_BETA).sigmoid_()
            gate = s.mul(_HIGH - _LOW).add_(_LOW).clamp_(0.0, 1.0)
            torch.mul(g, gate, out=dw)
            torch.mul(_slope(s, gate), w, out=s).mul_(g)
        return of_weight, noise, None


class _ExpectedOpen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_alpha: Tensor) -> Tensor:
        ctx.save_for_backward(log_alpha)
        return total((keep_probability(a) for (a,) in pieces(log_alpha)), log_alpha.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (log_alpha,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            kept = keep_probability(log_alpha)
            return gradient * kept * (1.0 - kept)
        slope = torch.empty_like(log_alpha)
        for a, out in pieces(log_alpha, slope):
            kept = keep_probability(a)
            torch.mul(kept, 1.0 - kept, out=out).mul_(gradient)
        return slope
