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
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from secateur.core.seeds import keyed_numpy
from secateur.errors import DataError, UnknownNameError, UsageError

__all__ = ["Rounding", "Scope", "Ties", "prune_count", "select"]

Scope = Literal["tensor", "global", "column"]
Ties = Literal["index", "random"]
Rounding = Literal["prune_floor", "keep_floor", "nearest"]

_CHUNK = 1 << 17
_DIRECT = 1 << 18
_SAMPLE = 1 << 16
_Array = np.ndarray


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
    arrays = {name: _Scores(name, tensor, absolute) for name, tensor in scores.items()}
    if scope == "global":
        total = sum(a.size for a in arrays.values())
        count = min(prune_count(total, float(sparsity), rounding), total - _protected(arrays, min_keep))  # type: ignore[arg-type]
        keep = _lowest_pruned(list(arrays.values()), count, ties, seed, min_keep)
        return {name: _as_mask(k, scores[name]) for (name, k) in zip(arrays, keep, strict=True)}
    chosen: dict[str, Tensor] = {}
    for name, array in arrays.items():
        share = sparsity[name] if isinstance(sparsity, Mapping) else sparsity
        if scope == "tensor":
            count = prune_count(array.size, share, rounding)
            count = min(count, array.size - min(min_keep, array.size))
            (keep_one,) = _lowest_pruned([array], count, ties, seed, 0)
        else:
            keep_one = _lowest_pruned_per_row(array, share, rounding, min_keep, ties, seed)
        chosen[name] = _as_mask(keep_one, scores[name])
    return chosen


class _Scores:
    """Read access to one score tensor as flat NumPy chunks, absolute value taken on the way.

    Cells listed in `safe` read as infinite: they are out of the contest.
    """

    def __init__(self, name: str, tensor: Tensor, absolute: bool) -> None:
        data = tensor.detach()
        if data.dtype in (torch.bfloat16, torch.float16):
            data = data.float()
        elif not data.is_floating_point():
            data = data.double()
        self.name, self.absolute, self.shape = name, absolute, tuple(tensor.shape)
        self.flat: _Array = data.cpu().contiguous().view(-1).numpy()
        self.size = int(self.flat.size)
        self.safe: _Array = np.empty(0, np.intp)

    def chunks(self) -> Iterator[tuple[int, _Array]]:
        """(offset, values) pieces that fit the cache."""
        buffer = np.empty(min(_CHUNK, self.size), self.flat.dtype) if self.absolute else None
        for start in range(0, self.size, _CHUNK):
            piece = self.flat[start : start + _CHUNK]
            values = np.abs(piece, out=buffer[: piece.size]) if buffer is not None else piece
            first, last = np.searchsorted(self.safe, (start, start + _CHUNK))
            if first < last:
                values = values.copy()
                values[self.safe[first:last] - start] = np.inf
            yield start, values

    def take(self, index: _Array) -> _Array:
        values = self.flat[index]
        return np.abs(values) if self.absolute else values

    def all(self) -> _Array:
        values = np.abs(self.flat) if self.absolute else self.flat.copy()
        values[self.safe] = np.inf
        return values


def _as_mask(keep: _Array, like: Tensor) -> Tensor:
    return torch.from_numpy(keep).reshape(like.shape).to(like.device)


def _protected(arrays: Mapping[str, _Scores], min_keep: int) -> int:
    return sum(min(min_keep, a.size) for a in arrays.values())


def _lowest_pruned(arrays: Sequence[_Scores], count: int, ties: Ties, seed: int, min_keep: int) -> list[_Array]:
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


def _contest(arrays: Sequence[_Scores], count: int, ties: Ties, seed: int) -> list[_Array]:
    """Keep all but the `count` lowest over all arrays, and every safe cell."""
    if count == 0:
        for array in arrays:
            _refuse_nan(array)
        return [np.ones(a.size, bool) for a in arrays]
    threshold, below, equal = _kth_smallest(arrays, count)
    keep = [_above(a, threshold) for a in arrays]
    if below + equal > count:
        _settle_ties(arrays, keep, threshold, count - below, ties, seed)
    for array, mask in zip(arrays, keep, strict=True):
        mask[array.safe] = True
    return keep


def _tie_keys(array: _Scores, seed: int) -> _Array:
    """A random priority for every cell, the same whatever the sparsity, so that masks stay nested."""
    return keyed_numpy(seed, "ties", array.name).random(array.size)


def _above(array: _Scores, threshold: float) -> _Array:
    keep = np.empty(array.size, bool)
    for start, values in array.chunks():
        np.greater(values, threshold, out=keep[start : start + values.size])
    return keep


def _settle_ties(
    arrays: Sequence[_Scores], keep: Sequence[_Array], threshold: float, prune: int, ties: Ties, seed: int
) -> None:
    """Of the cells equal to the threshold (all marked pruned so far), prune only `prune`; keep the rest."""
    equal = [_equal_indices(a, threshold) for a in arrays]
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


def _equal_indices(array: _Scores, threshold: float) -> _Array:
    found = [start + np.flatnonzero(values == threshold) for start, values in array.chunks()]
    equal = np.concatenate(found) if found else np.empty(0, np.intp)
    return np.setdiff1d(equal, array.safe, assume_unique=True) if array.safe.size else equal


def _refuse_nan(array: _Scores) -> None:
    for start, values in array.chunks():
        if np.isnan(values).any():
            at = start + int(np.flatnonzero(np.isnan(values))[0])
            raise DataError(
                f'scores of "{array.name}" are not numbers: first NaN at flat index {at} of {array.size}; '
                "the weights or the criterion diverged"
            )


def _kth_smallest(arrays: Sequence[_Scores], k: int) -> tuple[float, int, int]:
    """The k-th smallest value (k from 1) over all arrays; how many values are below it, and how many equal it."""
    total = sum(a.size for a in arrays)
    for array in arrays:
        # A NaN makes the sum NaN: one cheap read instead of an isnan mask.
        if bool(torch.from_numpy(array.flat).sum().isnan()):
            _refuse_nan(array)
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


def _kth_of(values: _Array, k: int) -> tuple[float, int, int]:
    threshold = np.partition(values, k - 1)[k - 1]
    return threshold, int(np.count_nonzero(values < threshold)), int(np.count_nonzero(values == threshold))


def _bracket(arrays: Sequence[_Scores], k: int, total: int) -> tuple[float, float]:
    """Two sampled values that enclose the k-th smallest with overwhelming probability (six standard errors)."""
    generator = np.random.default_rng(0)
    picks = []
    for array in arrays:
        wanted = max(1, round(_SAMPLE * array.size / total))
        picks.append(array.take(generator.integers(0, array.size, wanted)) if array.size else array.flat)
    sample = np.sort(np.concatenate(picks))
    share = k / total
    margin = 6.0 * math.sqrt(share * (1.0 - share) * sample.size) + 2.0
    low = max(0, math.floor(share * sample.size - margin))
    high = min(sample.size - 1, math.ceil(share * sample.size + margin))
    return sample[low], sample[high]


def _lowest_pruned_per_row(
    array: _Scores, sparsity: float, rounding: Rounding, min_keep: int, ties: Ties, seed: int
) -> _Array:
    if len(array.shape) != 2:
        raise UsageError(f'scope "column" wants scores [rows, cells], got shape {list(array.shape)} for "{array.name}"')
    _refuse_nan(array)
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
