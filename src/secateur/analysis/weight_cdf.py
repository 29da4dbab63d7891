"""How many weights are smaller than noise of a given deviation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.analysis.layers import layers_of
from secateur.core.targets import Targets
from secateur.errors import DataError, UsageError

__all__ = ["WeightCDF", "weight_cdf"]

# Weights counted at a time: what is held besides them is 16 bytes for each.
_PIECE = 1 << 20


@dataclass(frozen=True)
class WeightCDF:
    """Counts of weights below each sigma, in absolute value.

    Args:
        sigmas: as asked for.
        below: target name -> how many weights have |w| < sigma, for each sigma.
        counted: target name -> of how many.
    """

    sigmas: tuple[float, ...]
    below: dict[str, tuple[int, ...]]
    counted: dict[str, int]

    @property
    def layers(self) -> dict[str, tuple[float, ...] | None]:
        """Target name -> share for each sigma; None where no weight counts."""
        return {n: _shares(counts, self.counted[n]) for n, counts in self.below.items()}

    @property
    def shares(self) -> tuple[float, ...] | None:
        """Share of all targets' weights together, for each sigma; None where no weight counts."""
        totals = [sum(column) for column in zip(*self.below.values(), strict=True)]
        return _shares(totals, sum(self.counted.values()))


def weight_cdf(
    model: nn.Module, sigmas: Sequence[float], *, targets: Targets | None = None, zeros: bool = False
) -> WeightCDF:
    """The share of weights with |w| < sigma, per layer and in all: what noise of deviation sigma drowns.

    Args:
        sigmas: at least one, at least 0, finite; in any order.
        targets: whose weights; default: every prunable weight.
        zeros: count weights that are exactly zero too, as pruned ones are.

    Raises: `UsageError` for sigmas out of range, `DataError` for weights that are not finite.

    Cost: one pass over the weights. Counts are exact: weights and sigmas are compared in float64.

    Examples:
        >>> net = nn.Linear(4, 1, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[0.0, -0.5, 1.0, 2.0]]))
        >>> weight_cdf(net, [0.6, 1.0, 3.0]).below
        {'weight': (1, 1, 3)}
    """
    sigmas = [float(sigma) for sigma in sigmas]
    if not sigmas or not all(math.isfinite(s) and s >= 0 for s in sigmas):
        raise UsageError(f"weight_cdf: sigmas are one or more finite numbers of at least 0, got {sigmas}")
    _, _, parameters = layers_of(model, targets)
    below, counted = {}, {}
    for name, parameter in parameters.items():
        weight = parameter.detach()
        edges = torch.tensor(sorted(sigmas), dtype=torch.float64, device=weight.device)
        found = torch.zeros(len(edges) + 1, dtype=torch.int64, device=weight.device)
        zero = torch.zeros((), dtype=torch.int64, device=weight.device)
        for piece in weight.flatten().split(_PIECE):
            found += _bins(piece, edges, name)
            zero += (piece == 0).sum()
        left_out = 0 if zeros else int(zero)
        smaller = found.cumsum(0).tolist()
        at = dict(zip(edges.tolist(), smaller, strict=False))
        below[name] = tuple(max(0, at[s] - left_out) for s in sigmas)
        counted[name] = weight.numel() - left_out
    return WeightCDF(tuple(sigmas), below, counted)


def _bins(piece: Tensor, edges: Tensor, name: str) -> Tensor:
    size = piece.abs().double()
    if not bool(size.isfinite().all()):
        raise DataError(f'weight_cdf: "{name}" holds weights that are not finite; expected numbers')
    return torch.bincount(torch.bucketize(size, edges, right=True), minlength=len(edges) + 1)


def _shares(counts: Sequence[int], total: int) -> tuple[float, ...] | None:
    return tuple(count / total for count in counts) if total else None
