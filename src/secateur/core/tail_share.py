"""Masks by w^2 over the sum of v^2 of all v of the tensor that rank no lower (LAMP's score), without its scores.

Inside a tensor the score rises with |w| (with the index where |w| is equal), so a tensor loses its smallest weights and
only how many is in question. A sample brackets, in each tensor, the |w| at which the threshold lies; one read counts
what is below the bracket, sums the squares above it in float64 and collects the few percent inside, which alone are
sorted and scored. A tensor whose bracket turns out to miss the threshold is sorted whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from secateur.core.cells import CHUNK, Array, Cells
from secateur.core.select import Rounding, prune_count, select

__all__ = ["TailShares", "select_tail_shares"]

_SAMPLE = 1 << 12
_SAMPLE_SHARE = 1 / 128
_STANDARD_ERRORS = 5.0
_ALL = (0.0, math.inf)


class TailShares(Mapping[str, Tensor]):
    """Scores, computed when first looked at; `select_tail_shares` reads `weights` instead."""

    def __init__(self, weights: Mapping[str, Tensor], score: Callable[[], Mapping[str, Tensor]]) -> None:
        self.weights, self._score = weights, score

    @cached_property
    def _scores(self) -> Mapping[str, Tensor]:
        return self._score()

    def __getitem__(self, name: str) -> Tensor:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def select_tail_shares(
    scores: TailShares, sparsity: float, *, rounding: Rounding = "prune_floor", min_keep: int = 0
) -> dict[str, Tensor]:
    """The masks of `select(scores, sparsity, scope="global", ...)`, from the weights alone.

    They are the same to the bit, unless scores of two tensors agree to the rounding of the float64 sums, or squares of
    float64 weights underflow.

    Raises: `DataError` for weights that are not finite; `UsageError` for a sparsity outside [0, 1).

    Cost: two reads of the weights; extra memory five times what is inside the brackets (2 to 10 %), or the masks. Where
    very many equal weights are at the threshold, a sort of those.
    """
    arrays = [Cells(name, weight, absolute=True) for name, weight in scores.weights.items()]
    total = sum(a.size for a in arrays)
    count = min(prune_count(total, sparsity, rounding), total - sum(min(min_keep, a.size) for a in arrays))
    with np.errstate(invalid="ignore", over="ignore"):
        cuts = _cuts(arrays, count, min_keep) if total else None
    if cuts is None:
        for array in arrays:
            array.refuse_nan()
        return select(scores, sparsity, scope="global", rounding=rounding, min_keep=min_keep)
    return {a.name: a.as_mask(_kept(a, *cut)) for a, cut in zip(arrays, cuts, strict=True)}


def _kept(array: Cells, magnitude: float, ties: int | None) -> Array:
    """All but the smaller weights and, of those equal to `magnitude`, the first `ties` (None: all)."""
    keep = array.above(magnitude)
    if ties is not None:
        keep[array.equal(magnitude)[ties:]] = True
    return keep


def _cuts(arrays: Sequence[Cells], count: int, min_keep: int) -> list[tuple[float, int | None]] | None:
    """For `_kept`, so that the `count` lowest of all go; None if weights are not finite."""
    # To remove nothing, find the lowest weight and spare it: the weights must be read all the same.
    rank = max(1, count)
    brackets = dict(enumerate(_brackets(arrays, rank)))
    middles: dict[int, _Middle] = {}
    while brackets:
        middles |= {i: _middle(arrays[i], low, high, min_keep) for i, (low, high) in brackets.items()}
        if not all(math.isfinite(m.squares) for m in middles.values()):
            return None
        threshold = _kth_smallest(middles.values(), rank)
        brackets = {i: _ALL for i, m in middles.items() if not m.encloses(threshold)}
    first = [int(np.searchsorted(m.scores, threshold)) for m in middles.values()]
    spare = count - sum(m.below + f for m, f in zip(middles.values(), first, strict=True))
    cuts = []
    for middle, lower in zip(middles.values(), first, strict=True):
        equal = int(np.searchsorted(middle.scores, threshold, "right")) - lower
        ties = min(spare, equal)
        spare -= ties
        cuts.append(middle.cut(lower + ties))
    return cuts


@dataclass(frozen=True)
class _Middle:
    """What of a tensor may lie at the threshold, in order of rank.

    Args:
        below, above: how many weights rank below it, above it.
        squares: sum of the squares of it and of all above, not finite if any weight of the tensor is not.
    """

    magnitudes: Array
    scores: Array
    below: int
    above: int
    squares: float

    def encloses(self, threshold: float) -> bool:
        if self.below and self.scores[0] > threshold:
            return False
        return not (self.above and self.scores[-1] < threshold)

    def cut(self, pruned: int) -> tuple[float, int | None]:
        """For `_kept`, so that the `pruned` lowest of the middle go, and all below it."""
        if not self.magnitudes.size:
            return 0.0, None
        magnitude = self.magnitudes[max(0, pruned - 1)]
        first, end = (int(np.searchsorted(self.magnitudes, magnitude, side)) for side in ("left", "right"))
        return magnitude, None if pruned == end else pruned - first


def _kth_smallest(middles: Collection[_Middle], k: int) -> float:
    """Infinite where the k-th lowest of all tensors is in no middle."""
    scores = np.concatenate([m.scores for m in middles])
    rank = k - sum(m.below for m in middles)
    if not 1 <= rank <= scores.size:
        return math.copysign(math.inf, rank - 0.5)
    scores.partition(rank - 1)
    return float(scores[rank - 1])


def _middle(array: Cells, low: float, high: float, min_keep: int) -> _Middle:
    """The weights with `low` <= |w| <= `high`."""
    above, larger = 0, 0.0
    if low == 0.0 and high == math.inf:
        magnitudes = np.sort(array.all())
    else:
        wide = np.empty(min(CHUNK, array.size))
        inside = []
        for _, values in array.chunks():
            inside.append(values[np.flatnonzero((values >= low) & (values <= high))])
            over = values > high
            above += int(np.count_nonzero(over))
            # In double from here on; a product with False is 0, or NaN where the weight is not finite.
            squares = np.multiply(values, over, out=wide[: values.size])
            larger += float(np.square(squares, out=squares).sum())
        magnitudes = np.sort(np.concatenate(inside))
    scores, squares_down_to_low = _scores(magnitudes, larger)
    # The highest min_keep of a tensor are out of the contest.
    if above < min_keep:
        scores[max(0, scores.size - (min_keep - above)) :] = math.inf
    return _Middle(magnitudes, scores, array.size - magnitudes.size - above, above, squares_down_to_low)


def _scores(magnitudes: Array, larger: float) -> tuple[Array, float]:
    """Scores of ascending `magnitudes`, above which squares sum to `larger`; the sum of all squares."""
    squares = np.square(magnitudes[::-1], dtype=np.float64)
    at_least = np.cumsum(np.concatenate(([larger], squares)))[1:]
    total = float(at_least[-1]) if at_least.size else larger
    np.maximum(at_least, 1e-300, out=at_least)
    return np.divide(squares, at_least, out=squares)[::-1].copy(), total


def _brackets(arrays: Sequence[Cells], k: int) -> list[tuple[float, float]]:
    """Two magnitudes of each tensor that enclose, in all likelihood, those whose score is the k-th smallest of all."""
    samples = [_sample(a) for a in arrays]
    # A sampled weight stands for `every` weights, and so do those in the sum it is divided by.
    every = [a.size / max(1, s.size) for a, s in zip(arrays, samples, strict=True)]
    scores = [_scores(s, 0.0)[0] / e for s, e in zip(samples, every, strict=True)]
    pooled = np.concatenate(scores)
    order = np.argsort(pooled)
    reached = np.cumsum(np.repeat(every, [s.size for s in samples])[order])
    share = k / sum(a.size for a in arrays)
    variance = share * (1.0 - share) * sum(a.size * e for a, e in zip(arrays, every, strict=True) if e > 1.0)
    error = _STANDARD_ERRORS * math.sqrt(variance)
    ends = pooled[order[np.searchsorted(reached, (k - error, k + error)).clip(max=order.size - 1)]]
    return [
        _bracket(sample, own, *ends) if one > 1.0 else _ALL
        for sample, own, one in zip(samples, scores, every, strict=True)
    ]


def _bracket(sample: Array, scores: Array, low: float, high: float) -> tuple[float, float]:
    """Two magnitudes whose scores enclose `low` and `high`; `scores` are those of the sample, estimated."""
    first, last = int(np.searchsorted(scores, low)), int(np.searchsorted(scores, high, "right"))
    at = min((first + last) // 2, sample.size - 1)
    # The estimate's error in rank: that of the rank itself, and what the error of the sum of larger squares amounts to.
    squares = np.square(sample[at:], dtype=np.float64)
    doubt = 1.0 + math.sqrt(np.square(squares).sum()) / max(squares.sum(), 1e-300)
    spread = np.searchsorted(scores, (scores[at] / doubt, scores[at] * doubt))
    variance = at * (1.0 - at / sample.size) + (float(spread[1] - spread[0]) / 2.0) ** 2 + 1.0
    margin = math.ceil(_STANDARD_ERRORS * math.sqrt(variance))
    return (
        float(sample[first - margin]) if first > margin else 0.0,
        float(sample[last + margin]) if last + margin < sample.size else math.inf,
    )


def _sample(array: Cells) -> Array:
    """Sorted magnitudes of some weights; of all where they are few."""
    wanted = max(_SAMPLE, round(_SAMPLE_SHARE * array.size))
    if array.size <= 4 * wanted:
        return np.sort(array.all())
    # The same draw for every tensor of this size: equal tensors get equal sums.
    return np.sort(array.take(np.random.default_rng(0).integers(0, array.size, wanted)))
