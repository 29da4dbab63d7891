"""Many variants on the same data: batches read once, weights in place, results paired."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.criteria.gathering.batches import labelled, read, undisturbed
from secateur.errors import DataError, UsageError
from secateur.variants.inputs import call, moved, tensors
from secateur.variants.journal import Journal
from secateur.variants.kinds import Variant
from secateur.variants.outcome import Cost, Outcome
from secateur.variants.renew import renewed_statistics
from secateur.variants.workbench import Workbench

__all__ = ["Score", "data_mark", "evaluate_variants", "evaluation_basis", "right_or_wrong"]

Score = Callable[[Any, Any], Tensor]
Progress = Callable[[int, int], None]


def right_or_wrong(outputs: Tensor, labels: Tensor) -> Tensor:
    """Whether the largest output is the label's, `[examples]`; outputs that are not finite are wrong."""
    return (outputs.argmax(dim=1) == labels) & torch.isfinite(outputs).all(dim=1)


def evaluate_variants(
    bench: Workbench,
    variants: Sequence[Variant],
    batches: Iterable[Any],
    *,
    score: Score = right_or_wrong,
    recalibrate: Sequence[Any] | None = None,
    journal: str | os.PathLike[str] | None = None,
    hold: int = 1 << 30,
    progress: Progress | None = None,
) -> Outcome:
    """The value of every variant on every example.

    Args:
        bench: the network the variants are of. It is in eval mode meanwhile, and as it was afterwards.
        variants: at least one; equal ones are evaluated once.
        batches: `(inputs, labels)`, read once, on the device of the network or not.
        score: `(outputs, labels)` -> one value an example, bool or float; higher is better by convention.
        recalibrate: batches whose BatchNorm statistics replace the network's own in every variant (their cost is in
            `Outcome.cost`); None keeps the network's own.
        journal: file to write results to as they come and to continue from.
        hold: bytes of batches kept in memory at a time; every variant is made once for each such part of the data.
        progress: called with examples done and known so far to be to do.

    Returns: values in the order of `variants`.

    Raises: `UsageError` for no variants; `DataError` for a value that is not a number, `CheckpointError` for a journal
        of another evaluation or a damaged one, `StorageError` for one that cannot be read or written.

    Memory: that of the workbench whatever the number of variants, one part of the data, and the values.
    """
    unique = list(dict.fromkeys(variants))
    if not unique:
        raise UsageError("variants: none to evaluate; expected at least one")
    device = next(bench.network.parameters()).device
    book = None if journal is None else Journal(journal, evaluation_basis(bench, score, recalibrate))
    cost, parts = Cost(), []
    with undisturbed(bench.network), torch.no_grad():
        done = 0
        for number, part in enumerate(_parts(batches, hold, device)):
            size = sum(count for _, _, count in part)
            rows: dict[Variant, np.ndarray] = {}
            # Journals know parts by what is in them.
            name = number if book is None else data_mark(part)
            for variant in unique:
                found = None if book is None else book.get(variant, name, size)
                if found is None:
                    found, cost = _evaluate(bench, variant, part, score, recalibrate, cost)
                    if book is not None:
                        book.put(variant, name, found)
                rows[variant] = found
                done += size
                if progress is not None:
                    progress(done, done + size * (len(unique) - len(rows)))
            parts.append(np.stack([rows[v] for v in unique]))
    values = np.concatenate(parts, axis=1)
    order = {variant: row for row, variant in enumerate(unique)}
    if len(unique) < len(variants):
        values = values[[order[v] for v in variants]]
    return Outcome(tuple(variants), values, cost)


def _parts(batches: Iterable[Any], hold: int, device: torch.device) -> Iterator[list[tuple[Any, Any, int]]]:
    part: list[tuple[Any, Any, int]] = []
    held = 0
    for inputs, labels, count in labelled(batches, task="evaluation"):
        part.append((moved(inputs, device), moved(labels, device), count))
        held += sum(t.numel() * t.element_size() for t in tensors(inputs))
        if held >= hold:
            yield part
            part, held = [], 0
    if part:
        yield part


def _evaluate(
    bench: Workbench, variant: Variant, part: list[tuple[Any, Any, int]], score: Score, recalibrate: Any, cost: Cost
) -> tuple[np.ndarray, Cost]:
    values = []
    with bench.variant(variant) as model, renewed_statistics(model, recalibrate) as renewed:
        for inputs, labels, count in part:
            value = score(call(model, inputs), labels)
            if value.shape != (count,):
                raise UsageError(
                    f"variants: score gave shape {list(value.shape)}, expected one value an example [{count}]"
                )
            values.append(value.cpu())
    found = torch.cat(values)
    wrong = found.new_zeros(()) if found.dtype == torch.bool else found.isnan().sum()
    if wrong:
        raise DataError(
            f"variants: the score of {variant} is not a number for {int(wrong)} of {len(found)} examples; the network "
            "diverged under it, so leave it out, or use a score that says what that is worth"
        )
    row = found.numpy() if found.dtype == torch.bool else found.float().numpy()
    return row, Cost(cost.examples + len(row), cost.recalibration + renewed, cost.made + 1)


def evaluation_basis(bench: Workbench, score: Score, recalibrate: Sequence[Any] | None) -> dict[str, Any]:
    """What the values of an evaluation depend on besides variants and examples."""
    name = f"{getattr(score, '__module__', '')}.{getattr(score, '__qualname__', type(score).__name__)}"
    renewed = (
        None
        if recalibrate is None
        else data_mark([(i, y, n) for i, y, n in labelled(recalibrate, task="recalibration")])
    )
    scored = None if bench.batches is None else data_mark(list(read(bench.batches)))
    criteria = {name: repr(criterion) for name, criterion in bench.criteria.items()}
    return {
        "network": bench.fingerprint(),
        "criteria": criteria,
        "criteria's data": scored,
        "score": name,
        "recalibrate": renewed,
    }


def data_mark(part: list[tuple[Any, Any, int]]) -> int:
    """A number for what is in a part of the data, however it is split into batches."""
    digests: dict[tuple[int, str], Any] = {}
    for inputs, labels, _ in part:
        for place, tensor in enumerate(tensors([inputs, labels])):
            key = (place, repr((tensor.dtype, tuple(tensor.shape[1:]))))
            bytes_ = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            digests.setdefault(key, hashlib.sha256()).update(bytes_)
    whole = hashlib.sha256(repr([(key, digest.hexdigest()) for key, digest in digests.items()]).encode())
    return int.from_bytes(whole.digest()[:7], "big")
