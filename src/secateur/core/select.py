"""Scores and a sparsity to kept cells, with exact counts.

Every function prunes exactly as many cells as it is asked to, whatever the ties; the lowest scores go
first, and among equal scores the lowest index (or a seeded random choice). Masks are nested: a higher
sparsity keeps a subset of what a lower one keeps.

The threshold of a large set is found by bracketing it with a sample and sorting only what falls inside
the bracket: exact, one read of the data, a few percent of extra memory (a full sort is some fifty times
slower; `torch.topk` and `kthvalue` are no better at these sizes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from secateur.core.cells import Array, Cells
from secateur.core.seeds import keyed_numpy
from secateur.errors import UnknownNameError, UsageError

__all__ = ["Rounding", "Scope", "Ties", "prune_count", "select"]

Scope = Literal["tensor", "global", "column"]
Ties = Literal["index", "random"]
Rounding = Literal["prune_floor", "keep_floor", "nearest"]

_DIRECT = 1 << 18
_SAMPLE = 1 << 16


def prune_count(cells: int, sparsity: float, rounding: Rounding = "prune_floor") -> int:
    """How many of `cells` cells a sparsity in [0, 1) removes.

    Args:
        rounding: `"prune_floor"` removes floor(s n), never more than asked (thesis, Targeted Dropout);
            `"keep_floor"` keeps floor((1 - s) n) (DDROP's tables); `"nearest"` rounds half up.

    Examples:
        >>> prune_count(10, 0.9), prune_count(10, 0.75, "keep_floor"), prune_count(10, 0.75, "nearest")
        (9, 8, 8)
    """
    if not 0.0 <= sparsity < 1.0:
        raise UsageError(f"sparsity is the fraction removed and lies in [0, 1), got {sparsity}")
    # 1e-9: 10 * (1 - 0.9) is 0.9999... in floating point, and must count as 1.
    if rounding == "prune_floor":
        return math.floor(cells * sparsity + 1e-9)
    if rounding == "keep_floor":
        return cells - math.floor(cells * (1.0 - sparsity) + 1e-9)
    if rounding == "nearest":
        return math.floor(cells * sparsity + 0.5 + 1e-9)
    raise UnknownNameError("rounding", rounding, ["prune_floor", "keep_floor", "nearest"])


def select(
    scores: Mapping[str, Tensor],
    sparsity: float | Mapping[str, float],
    *,
    scope: Scope = "tensor",
    rounding: Rounding = "prune_floor",
    min_keep: int = 0,
    ties: Ties = "index",
    seed: int = 0,
    absolute: bool = False,
) -> dict[str, Tensor]:
    """Which cells to keep.

    Args:
        scores: one tensor of cell scores per target; higher = keep. `"column"` wants 2-D scores.
        sparsity: fraction of cells to remove in [0, 1), or (scope `"tensor"`) one fraction per target.
        scope: `"tensor"` removes the fraction inside each tensor, `"global"` over all tensors together,
            `"column"` inside each row of the scores (the sources' columns of one unit's weights).
        rounding: see `prune_count`.
        min_keep: cells that each tensor (each row, for `"column"`) keeps at least; with `"global"` the total
            stays exact and others give way.
        ties: among equal scores prune the lowest `"index"` first, or a `"random"` one drawn from `seed`.
        absolute: rank by the absolute value of `scores` without making a copy of it.

    Returns: bool tensors (True = kept), shaped and placed like `scores`.

    Raises: `DataError` for scores that are NaN; `UsageError` for a sparsity outside [0, 1).

    Cost: one or two reads of the scores; extra memory a few percent of theirs, plus the masks.

    Examples:
        >>> select({"w": torch.tensor([0.5, -0.2, 0.05, 1.0])}, 0.5, absolute=True)
        {'w': tensor([ True, False, False,  True])}
    """
    if scope not in ("tensor", "global", "column"):
        raise UnknownNameError("scope", scope, ["tensor", "global", "column"])
    if ties not in ("index", "random"):
        raise UnknownNameError("tie rule", ties, ["index", "random"])
    if isinstance(sparsity, Mapping) and scope == "global":
        raise UsageError('scope "global" takes one sparsity, got one per tensor; use scope "tensor"')
    arrays = {name: Cells(name, tensor, absolute) for name, tensor in scores.items()}
    if scope == "global":
        total = sum(a.size for a in arrays.values())
        count = min(prune_count(total, float(sparsity), rounding), total - _protected(arrays, min_keep))  # type: ignore[arg-type]
        keep = _lowest_pruned(list(arrays.values()), count, ties, seed, min_keep)
        return {name: array.as_mask(k) for (name, array), k in zip(arrays.items(), keep, strict=True)}
    chosen: dict[str, Tensor] = {}
    for name, array in arrays.items():
        share = sparsity[name] if isinstance(sparsity, Mapping) else sparsity
        if scope == "tensor":
            count = prune_count(array.size, share, rounding)
            count = min(count, array.size - min(min_keep, array.size))
            (keep_one,) = _lowest_pruned([array], count, ties, seed, 0)
        else:
            keep_one = _lowest_pruned_per_row(array, share, rounding, min_keep, ties, seed)
        chosen[name] = array.as_mask(keep_one)
    return chosen


def _protected(arrays: Mapping[str, Cells], min_keep: int) -> int:
    return sum(min(min_keep, a.size) for a in arrays.values())


def _lowest_pruned(arrays: Sequence[Cells], count: int, ties: Ties, seed: int, min_keep: int) -> list[Array]:
    """Keep all but the `count` lowest over all arrays; the `min_keep` highest of each array are safe."""
    while True:
        keep = _contest(arrays, count, ties, seed)
        short = [a for a, k in zip(arrays, keep, strict=True) if np.count_nonzero(k) < min(min_keep, k.size)]
        if not short:
            return keep
        del keep
        for array in short:
            (best,) = _contest([array], array.size - min(min_keep, array.size), ties, seed)
            array.safe = np.flatnonzero(best)


def _contest(arrays: Sequence[Cells], count: int, ties: Ties, seed: int) -> list[Array]:
    """Keep all but the `count` lowest over all arrays, and every safe cell."""
    if count == 0:
        for array in arrays:
            array.refuse_nan()
        return [np.ones(a.size, bool) for a in arrays]
    threshold, below, equal = _kth_smallest(arrays, count)
    keep = [a.above(threshold) for a in arrays]
    if below + equal > count:
        _settle_ties(arrays, keep, threshold, count - below, ties, seed)
    for array, mask in zip(arrays, keep, strict=True):
        mask[array.safe] = True
    return keep


def _tie_keys(array: Cells, seed: int) -> Array:
    """A random priority for every cell, the same whatever the sparsity, so that masks stay nested."""
    return keyed_numpy(seed, "ties", array.name).random(array.size)


def _settle_ties(
    arrays: Sequence[Cells], keep: Sequence[Array], threshold: float, prune: int, ties: Ties, seed: int
) -> None:
    """Of the cells equal to the threshold (all marked pruned so far), prune only `prune`; keep the rest."""
    equal = [a.equal(threshold) for a in arrays]
    if ties == "random":
        owner = np.concatenate([np.full(e.size, i) for i, e in enumerate(equal)])
        index = np.concatenate(equal)
        keys = np.concatenate([_tie_keys(a, seed)[e] for a, e in zip(arrays, equal, strict=True)])
        spared = np.argsort(keys, kind="stable")[prune:]
        for i in range(len(arrays)):
            keep[i][index[spared[owner[spared] == i]]] = True
        return
    for mask, indices in zip(keep, equal, strict=True):
        pruned_here = min(prune, indices.size)
        mask[indices[pruned_here:]] = True
        prune -= pruned_here


def _kth_smallest(arrays: Sequence[Cells], k: int) -> tuple[float, int, int]:
    """The k-th smallest value (k from 1) over all arrays; how many values are below it, and how many equal it."""
    total = sum(a.size for a in arrays)
    for array in arrays:
        # A NaN makes the sum NaN: one cheap read instead of an isnan mask.
        if bool(torch.from_numpy(array.flat).sum().isnan()):
            array.refuse_nan()
    if total <= _DIRECT:
        return _kth_of(np.concatenate([a.all() for a in arrays]), k)
    low, high = _bracket(arrays, k, total)
    below = at_low = at_high = 0
    inside = []
    for array in arrays:
        for _, values in array.chunks():
            below += int(np.count_nonzero(values < low))
            candidates = values[np.flatnonzero((values >= low) & (values <= high))]
            # Values equal to a bracket end are counted, not collected: quantized or zero weights would fill memory.
            is_low, is_high = candidates == low, candidates == high
            at_low += int(np.count_nonzero(is_low))
            at_high += int(np.count_nonzero(is_high)) if high != low else 0
            inside.append(candidates[~(is_low | is_high)])
    rank = k - below
    if rank < 1:
        return _kth_of(np.concatenate([a.all() for a in arrays]), k)
    if rank <= at_low:
        return low, below, at_low
    below += at_low
    rank -= at_low
    middle = np.concatenate(inside)
    if rank <= middle.size:
        threshold, under, equal = _kth_of(middle, rank)
        return threshold, below + under, equal
    below += middle.size
    if rank - middle.size <= at_high:
        return high, below, at_high
    return _kth_of(np.concatenate([a.all() for a in arrays]), k)


def _kth_of(values: Array, k: int) -> tuple[float, int, int]:
    threshold = np.partition(values, k - 1)[k - 1]
    return threshold, int(np.count_nonzero(values < threshold)), int(np.count_nonzero(values == threshold))


def _bracket(arrays: Sequence[Cells], k: int, total: int) -> tuple[float, float]:
    """Two sampled values that enclose the k-th smallest with overwhelming probability (six standard errors)."""
    # What a sample of n leaves between its brackets is of order total / sqrt(n): both stay small for any total.
    size = max(_SAMPLE, int(total ** (2 / 3)) // 2)
    generator = np.random.default_rng(0)
    picks = []
    for array in arrays:
        wanted = max(1, round(size * array.size / total))
        picks.append(array.take(generator.integers(0, array.size, wanted)) if array.size else array.flat)
    sample = np.sort(np.concatenate(picks))
    share = k / total
    margin = 6.0 * math.sqrt(share * (1.0 - share) * sample.size) + 2.0
    low = max(0, math.floor(share * sample.size - margin))
    high = min(sample.size - 1, math.ceil(share * sample.size + margin))
    return sample[low], sample[high]


def _lowest_pruned_per_row(
    array: Cells, sparsity: float, rounding: Rounding, min_keep: int, ties: Ties, seed: int
) -> Array:
    if len(array.shape) != 2:
        raise UsageError(f'scope "column" wants scores [rows, cells], got shape {list(array.shape)} for "{array.name}"')
    array.refuse_nan()
    rows, width = array.shape
    count = min(prune_count(width, sparsity, rounding), width - min(min_keep, width))
    values = array.all().reshape(rows, width)
    if ties == "index":
        order = np.argsort(values, axis=1, kind="stable")
    else:
        shuffled = keyed_numpy(seed, "ties", array.name).permuted(np.tile(np.arange(width), (rows, 1)), axis=1)
        by_value = np.argsort(np.take_along_axis(values, shuffled, 1), axis=1, kind="stable")
        order = np.take_along_axis(shuffled, by_value, 1)
    keep = np.ones((rows, width), bool)
    np.put_along_axis(keep, order[:, :count], False, axis=1)
    return keep.reshape(-1)
