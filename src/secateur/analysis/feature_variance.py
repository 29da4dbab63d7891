"""How much each layer's outputs vary, and what is left of that in a changed network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.analysis.layers import layers_of
from secateur.core.targets import Targets
from secateur.criteria.gathering.batches import Batches, read, undisturbed
from secateur.criteria.observe import UnitOutputs
from secateur.errors import DataError, UsageError

__all__ = ["FeatureVariance", "VarianceRatio", "feature_variance", "variance_ratio"]

# Values looked at together, so that what is held besides the activation stays small.
_PIECE = 1 << 19
# The squared means' share of the mean square up to which no digits to speak of are lost by their difference.
_SAFE = 0.9
# From so many positions on, summing each channel's own is faster than summing samples at each position.
_LONG = 32


@dataclass(frozen=True)
class FeatureVariance:
    """Variance of the outputs of each layer.

    Args:
        layers: target name -> sum over channels of the variance over samples and positions, mean over batches.
        samples: how many that is of.
    """

    layers: dict[str, float]
    samples: int


@dataclass(frozen=True)
class VarianceRatio:
    """Feature variance of a changed network over that of the dense one.

    Args:
        layers: target name -> ratio; below 1: the outputs vary less than they did. None where the dense network's do
            not vary at all.
        mean: over the layers that have a ratio; None if none has.
    """

    layers: dict[str, float | None]
    mean: float | None


def feature_variance(model: nn.Module, batches: Batches, *, targets: Targets | None = None) -> FeatureVariance:
    """Variance of the outputs of convolution and linear layers, before any BatchNorm, in eval mode.

    Unbiased, per channel over samples and positions of a batch, summed over channels; then the mean over batches.
    So the batch size counts for little, but take the same batches for networks that are compared.

    Args:
        model: called as it is, and left as it was found.
        batches: inputs or `(inputs, labels)`. A batch that holds a single value of each channel of a layer has no
            variance and is left out there. A layer that is called several times counts each call as a batch.
        targets: layers to look at; default: all of them.

    Raises: `DataError` for no data or outputs that are not finite, `UsageError` for a layer that is not called, or not
        as a convolution or linear layer (attention).

    Cost: one forward pass, and two reads of each output; where the mean is large beside the deviation, three more
        and a write, and 2 MB (one sample, if that is larger) besides.

    Reference: stochastic pruning, section on feature variance (its V is the mean of `variance_ratio`).

    Examples:
        >>> net = nn.Linear(2, 2, bias=False)
        >>> _ = nn.init.eye_(net.weight)
        >>> round(feature_variance(net, [torch.tensor([[1.0, 2.0], [3.0, 6.0]])]).layers["weight"], 5)
        10.0
    """
    network, _, parameters = layers_of(model, targets)
    calls: dict[str, int] = {}
    sums: dict[str, Tensor] = {}

    def on_call(name: str, call: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        calls.setdefault(name, 0)
        found = _variance(output.detach(), call)
        if found is not None:
            calls[name] += 1
            sums[name] = sums[name].add_(found) if name in sums else found

    watch = UnitOutputs({id(p): name for name, p in parameters.items()}, lambda *_: None, on_call)
    samples = 0
    with undisturbed(network), torch.no_grad():
        for inputs, _, count in read(batches):
            with watch:
                network(inputs)
                watch.finish()
            samples += count
    return FeatureVariance({name: _mean(name, calls, sums) for name in parameters}, samples)


def variance_ratio(
    changed: FeatureVariance | Sequence[FeatureVariance], dense: FeatureVariance | Sequence[FeatureVariance]
) -> VarianceRatio:
    """Ratio of feature variances, layer by layer; several networks on a side are averaged first.

    Nothing is presumed: below 1 variance has collapsed, above 1 it has exploded.

    Raises: `UsageError` where the layers differ, or nothing is given.

    Examples:
        >>> variance_ratio(FeatureVariance({"a": 1.0, "b": 3.0}, 8), FeatureVariance({"a": 4.0, "b": 0.0}, 8))
        VarianceRatio(layers={'a': 0.25, 'b': None}, mean=0.25)
    """
    above, below = _average("changed", changed), _average("dense", dense)
    if above.keys() != below.keys():
        name = sorted(above.keys() ^ below.keys())[0]
        raise UsageError(f'variance_ratio: layer "{name}" is on one side only; give the same targets to both')
    layers = {name: above[name] / below[name] if below[name] else None for name in below}
    ratios = [ratio for ratio in layers.values() if ratio is not None]
    return VarianceRatio(layers, sum(ratios) / len(ratios) if ratios else None)


def _variance(output: Tensor, call: str) -> Tensor | None:
    """Summed over channels, float64; None where each channel has one value."""
    units = output.shape[-1] if call == "linear" else output.shape[1]
    count = output.numel() // units
    if count < 2:
        return None
    values = _per_channel(output, call, units)
    total, square = _moments(values)
    if not bool(total.dot(total) <= _SAFE * count * square):
        # One of the values takes away most of what would cancel, and leaves exactly 0 where all are the same.
        shift = values[0, :, values.shape[2] // 2, None]
        total, square = torch.zeros_like(total), torch.zeros_like(square)
        for piece in values.split(max(1, _PIECE * len(values) // values.numel())):
            sums, squares = _moments((piece if piece.dtype.itemsize > 2 else piece.float()) - shift)
            total, square = total + sums, square + squares
    return (square - total.dot(total) / count) / (count - 1)


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over each channel, and sum of all squares, float64."""
    wide = values.dtype if values.dtype.itemsize > 2 else torch.float32
    sums = values.sum(2, dtype=wide) if values.shape[2] >= _LONG else values.sum(0, dtype=wide).T
    norm = torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=wide).double()
    return sums.sum(0, dtype=torch.float64), norm.dot(norm)


def _per_channel(output: Tensor, call: str, units: int) -> Tensor:
    """`[rows, channels, positions]`, without a copy where that can be."""
    if call == "linear":
        return output.reshape(-1, units, 1)
    if output.dim() == 4 and output.is_contiguous(memory_format=torch.channels_last):
        return output.permute(0, 2, 3, 1).reshape(-1, units, 1)
    return output.flatten(2)


def _mean(name: str, calls: dict[str, int], sums: dict[str, Tensor]) -> float:
    if name not in calls:
        raise UsageError(
            f'feature_variance: "{name}" was not used by a convolution or linear layer during the forward pass; '
            "exclude it from the targets"
        )
    if not calls[name]:
        raise DataError(
            f'feature_variance: every batch holds one value of each channel of "{name}"; expected batches of 2 or more'
        )
    value = float(sums[name]) / calls[name]
    if not math.isfinite(value):
        raise DataError(f'feature_variance: the outputs of "{name}" are not finite, or too large; expected numbers')
    return max(0.0, value)


def _average(side: str, values: FeatureVariance | Sequence[FeatureVariance]) -> dict[str, float]:
    several = [values] if isinstance(values, FeatureVariance) else list(values)
    if not several:
        raise UsageError(f"variance_ratio: {side} is empty; expected at least one feature variance")
    if any(v.layers.keys() != several[0].layers.keys() for v in several):
        raise UsageError(f"variance_ratio: those of {side} are of different layers; give the same targets to all")
    return {name: sum(v.layers[name] for v in several) / len(several) for name in several[0].layers}
