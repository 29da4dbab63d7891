"""The two pairs of objectives of the stochastic-pruning paper, from measured numbers to objective values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from secateur.errors import UsageError

__all__ = ["ACCURACY_AND_GAIN", "ACCURACY_AND_SPARSITY", "accuracy_and_gain", "accuracy_and_sparsity"]

ACCURACY_AND_SPARSITY: tuple[tuple[str, Literal["maximize"]], ...] = (
    ("accuracy", "maximize"),
    ("sparsity", "maximize"),
)
ACCURACY_AND_GAIN: tuple[tuple[str, Literal["maximize"]], ...] = (("accuracy", "maximize"), ("gain", "maximize"))


def accuracy_and_sparsity(noisy: Sequence[float], sparsity: float) -> dict[str, float]:
    """Mean accuracy of the noisy pruned networks, and the sparsity: both to be maximized.

    Args:
        noisy: accuracy of each network, at least one.
        sparsity: fraction of the weights removed, in [0, 1].

    Examples:
        >>> accuracy_and_sparsity([0.75, 1.0], 0.5)
        {'accuracy': 0.875, 'sparsity': 0.5}
    """
    return {"accuracy": _mean(noisy), "sparsity": _fraction(sparsity)}


def accuracy_and_gain(noisy: Sequence[float], plain: float, sparsity: float) -> dict[str, float]:
    """Mean accuracy of the noisy pruned networks, and what noise gains: both to be maximized.

    The gain is the mean minus the accuracy of the network pruned without noise to the same sparsity; multiplied by the
    sparsity where it is positive, as it is where it is not, since less of a loss must not be worth more.

    Args:
        noisy: accuracy of each network, at least one.
        plain: accuracy of the network pruned without noise, in the same unit.
        sparsity: fraction of the weights removed, in [0, 1].

    Examples:
        >>> accuracy_and_gain([88.0, 90.0], 39.0, 0.5)
        {'accuracy': 89.0, 'gain': 25.0}
        >>> accuracy_and_gain([30.0], 39.0, 0.5)["gain"]
        -9.0
    """
    accuracy, share = _mean(noisy), _fraction(sparsity)
    difference = accuracy - float(plain)
    return {"accuracy": accuracy, "gain": difference * share if difference > 0 else difference}


def _mean(values: Sequence[float]) -> float:
    if not len(values):
        raise UsageError("objective: no accuracies of noisy networks; expected at least one")
    return float(sum(values)) / len(values)


def _fraction(sparsity: float) -> float:
    if not 0 <= sparsity <= 1:
        raise UsageError(f"objective: sparsity: got {sparsity!r}, expected a fraction in [0, 1]")
    return float(sparsity)
