"""Races of a network's variants: the examples in random order, winners judged in full precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from secateur.core.seeds import keyed_generator
from secateur.criteria.gathering.batches import labelled, undisturbed
from secateur.errors import UnknownNameError, UsageError
from secateur.variants.evaluate import Score, right_or_wrong
from secateur.variants.inputs import fitting_batch
from secateur.variants.kinds import Variant
from secateur.variants.pareto_race import FrontArm, FrontResult, pareto_race
from secateur.variants.race import Arm, RaceResult, race
from secateur.variants.rungs import Values
from secateur.variants.workbench import Workbench

__all__ = ["race_front", "race_variants"]

Precision = Literal["float32", "bfloat16"]


def race_variants(
    bench: Workbench,
    arms: Sequence[Arm],
    batches: Iterable[Any],
    *,
    score: Score = right_or_wrong,
    precision: Precision = "float32",
    batch_size: int | None = None,
    seed: int = 0,
    **options: Any,
) -> RaceResult:
    """`race` on a network: which arms are best on all examples.

    Args:
        bench: the network the variants are of.
        batches: `(inputs, labels)`, tensors, read once and kept in memory.
        score: `(outputs, labels)` -> one value an example, higher is better; values span at most 1, as those of right
            or wrong do. `error` does not hold for a score that spans more: scale it.
        precision: what arms are left out by. In `"bfloat16"` (autocast) the last rung is float32 on everything, so
            that the winners among the survivors, and the values, are those of float32; but an arm may have been left
            out that only bfloat16 puts behind, which `error` does not count.
        batch_size: examples passed through the network at a time; default: as many as a processor's cache holds.
        seed: of the order of the examples.
        options: `top`, `error`, `first`, `growth` and `replicas` of `race`.

    Returns: as `race`; `evaluated` counts values of either precision.
    """
    with _values(bench, batches, score, precision, batch_size, seed) as (values, exact, examples):
        return race(arms, values, examples, final=None if precision == "float32" else exact, **options)


def race_front(
    bench: Workbench,
    arms: Sequence[FrontArm],
    batches: Iterable[Any],
    *,
    score: Score = right_or_wrong,
    precision: Precision = "float32",
    batch_size: int | None = None,
    seed: int = 0,
    **options: Any,
) -> FrontResult:
    """`pareto_race` on a network: which arms no other dominates, on all examples.

    Args:
        bench: the network the variants are of.
        arms: what competes. For stochastic pruning's accuracy and sparsity: the noisy variants of one (sigma,
            sparsity) and `known=(sparsity,)`; for accuracy and gain: the same variants, the deterministic network of
            that sparsity as `baseline`, and the sparsity as `factor`.
        batches: `(inputs, labels)`, tensors, read once and kept in memory.
        score: `(outputs, labels)` -> one value an example, higher is better, between 0 and 1 or near that.
        precision: what arms are left out by. In `"bfloat16"` (autocast) the last rung is float32 on everything, so
            that the front of the survivors, and the values, are those of float32; but an arm may have been left out
            that only bfloat16 puts behind, which `error` does not count. Survivors are evaluated in both, so it pays
            where the front is a small share of the arms.
        batch_size: examples passed through the network at a time; default: as many as a processor's cache holds.
        seed: of the order of the examples.
        options: `whole_losses`, `error`, `first`, `growth` and `replicas` of `pareto_race`.

    Returns: as `pareto_race`; `evaluated` counts values of either precision.
    """
    with _values(bench, batches, score, precision, batch_size, seed) as (values, exact, examples):
        return pareto_race(arms, values, examples, final=None if precision == "float32" else exact, **options)


@contextmanager
def _values(
    bench: Workbench, batches: Iterable[Any], score: Score, precision: Precision, batch_size: int | None, seed: int
) -> Iterator[tuple[Values, Values, int]]:
    """Values in the precision asked for, values in float32, and how many examples there are, in random order."""
    if precision not in ("float32", "bfloat16"):
        raise UnknownNameError("race precision", precision, ["float32", "bfloat16"])
    device = next(bench.network.parameters()).device
    inputs, labels = _gathered(batches, device)
    order = torch.randperm(len(labels), generator=keyed_generator(seed, "race")).to(device)
    inputs, labels = inputs[order], labels[order]
    size = fitting_batch(bench.network, inputs[:1]) if batch_size is None else batch_size

    def of(fast: bool) -> Callable[[Variant, int, int], np.ndarray]:
        def values(variant: Variant, start: int, stop: int) -> np.ndarray:
            found = []
            # An autocast around this one would keep the weights of an earlier variant.
            cast = torch.autocast(device.type, torch.bfloat16, enabled=fast, cache_enabled=False)
            with bench.variant(variant) as model, cast:
                for first in range(start, stop, size):
                    part = slice(first, min(stop, first + size))
                    found.append(score(model(inputs[part]), labels[part]).float().cpu())
            return torch.cat(found).numpy()

        return values

    with undisturbed(bench.network), torch.no_grad():
        yield of(precision == "bfloat16"), of(False), len(labels)


def _gathered(batches: Iterable[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    read = [(inputs, labels) for inputs, labels, _ in labelled(batches, task="race")]
    if not all(isinstance(part, Tensor) for batch in read for part in batch):
        raise UsageError("race: inputs and labels must be tensors; for others use evaluate_variants")
    return torch.cat([i for i, _ in read]).to(device), torch.cat([y for _, y in read]).to(device)
