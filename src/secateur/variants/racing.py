"""Races of a network's variants: the examples in random order, winners judged in full precision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from secateur.core.seeds import keyed_generator
from secateur.criteria.gathering.batches import labelled, undisturbed
from secateur.errors import UnknownNameError, UsageError
from secateur.variants.evaluate import Score, right_or_wrong
from secateur.variants.kinds import Variant
from secateur.variants.race import Arm, RaceResult, race
from secateur.variants.workbench import Workbench

__all__ = ["race_variants"]


def race_variants(
    bench: Workbench,
    arms: Sequence[Arm],
    batches: Iterable[Any],
    *,
    score: Score = right_or_wrong,
    precision: Literal["float32", "bfloat16"] = "float32",
    batch_size: int = 250,
    seed: int = 0,
    **options: Any,
) -> RaceResult:
    """`race` on a network: which arms are best on all examples.

    Args:
        bench: the network the variants are of.
        batches: `(inputs, labels)`, tensors, read once and kept in memory.
        score: `(outputs, labels)` -> one value an example, higher is better.
        precision: what the race is run in. In `"bfloat16"` (autocast) survivors are evaluated once more in float32,
            and the winners and values are those of float32.
        batch_size: examples passed through the network at a time.
        seed: of the order of the examples.
        options: `top`, `error`, `first`, `growth` and `replicas` of `race`.

    Returns: as `race`; `evaluated` counts the second evaluation too.
    """
    if precision not in ("float32", "bfloat16"):
        raise UnknownNameError("race precision", precision, ["float32", "bfloat16"])
    device = next(bench.network.parameters()).device
    inputs, labels = _gathered(batches, device)
    order = torch.randperm(len(labels), generator=keyed_generator(seed, "race")).to(device)

    def evaluate(variant: Variant, start: int, stop: int, fast: bool) -> np.ndarray:
        found = []
        with bench.variant(variant) as model, torch.autocast(device.type, torch.bfloat16, enabled=fast):
            for index in order[start:stop].split(batch_size):
                found.append(score(model(inputs[index]), labels[index]).float().cpu())
        return torch.cat(found).numpy()

    fast = precision == "bfloat16"
    with undisturbed(bench.network), torch.no_grad():
        result = race(arms, lambda v, a, b: evaluate(v, a, b, fast), len(labels), **options)
        if not fast:
            return result
        chosen = sorted(result.values)
        again = race(
            [arms[i] for i in chosen],
            lambda v, a, b: evaluate(v, a, b, False),
            len(labels),
            top=len(result.winners),
            first=max(2, len(labels)),
            replicas=max(len(arm.variants) for arm in arms),
        )
    return replace(
        result,
        winners=tuple(chosen[i] for i in again.winners),
        values={chosen[i]: value for i, value in again.values.items()},
        evaluated=result.evaluated + again.evaluated,
    )


def _gathered(batches: Iterable[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    read = [(inputs, labels) for inputs, labels, _ in labelled(batches, "a race of variants")]
    if not all(isinstance(part, Tensor) for batch in read for part in batch):
        raise UsageError("race: inputs and labels must be tensors; for others use evaluate_variants")
    return torch.cat([i for i, _ in read]).to(device), torch.cat([y for _, y in read]).to(device)
