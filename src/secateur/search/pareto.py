"""Which trials no other trial beats, how they are spread, and how much they cover."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from secateur.errors import UsageError

__all__ = ["crowding", "front", "hypervolume", "hypervolume_series"]

Points = NDArray[np.float64]


def front(points: ArrayLike, directions: Sequence[str]) -> list[int]:
    """Indices of the points that no other point dominates, in their order; equal points are all kept.

    One point dominates another if it is nowhere worse and somewhere better.

    Args:
        points: `[points, objectives]`, finite.
        directions: "maximize" or "minimize" for each objective.

    Examples:
        >>> front([(90, 0.5), (80, 0.8), (70, 0.7), (60, 0.9), (90, 0.4)], ["maximize", "maximize"])
        [0, 1, 3]
    """
    losses = _losses(points, directions)
    kept = []
    for index, loss in enumerate(losses):
        nowhere_worse, better = (losses <= loss).all(axis=1), (losses < loss).any(axis=1)
        if not (nowhere_worse & better).any():
            kept.append(index)
    return kept


def crowding(points: ArrayLike) -> NDArray[np.float64]:
    """NSGA-II's crowding distance of every point among these, `[points]`; which way is better does not matter.

    For each objective: the gap between the two neighbors, over the range of all; infinite at both ends. An objective
    in which all are equal adds nothing. A point alone has distance infinity.

    Reference: Deb et al. 2002, section III-B.

    Examples:
        >>> [round(float(d), 9) for d in crowding([(90, 0.5), (80, 0.8), (60, 0.9)])]
        [inf, 2.0, inf]
    """
    values = _values(points, None)
    distance = np.zeros(len(values))
    if len(values) == 1:
        return np.full(1, np.inf)
    for column in values.T:
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        width = ordered[-1] - ordered[0] if len(ordered) else 0.0
        if not width:
            continue
        distance[order[[0, -1]]] = np.inf
        distance[order[1:-1]] += (ordered[2:] - ordered[:-2]) / width
    return distance


def hypervolume(points: ArrayLike, reference: Sequence[float], directions: Sequence[str]) -> float:
    """Area (2 objectives) or volume (3) of what the points dominate up to `reference`; exact.

    A point that is not better than the reference in every objective covers nothing.

    Args:
        points: `[points, 2 or 3]`, finite.
        reference: the worst that counts, one value an objective.
        directions: "maximize" or "minimize" for each objective.

    Cost: O(n log n) for 2 objectives, O(n^2 log n) for 3.

    Examples:
        >>> hypervolume([(1, 2), (2, 1)], (0, 0), ["maximize", "maximize"])
        3.0
    """
    worst = _losses([list(reference)], directions)[0]
    if len(worst) not in (2, 3):
        raise UsageError(f"hypervolume: got {len(worst)} objectives, expected 2 or 3")
    losses = _losses(points, directions)
    inside = losses[(losses < worst).all(axis=1)]
    return _area(inside, worst) if len(worst) == 2 else _volume(inside, worst)


def hypervolume_series(points: ArrayLike, reference: Sequence[float], directions: Sequence[str]) -> list[float]:
    """The hypervolume of the first point, the first two, and so on; it never falls."""
    values = _values(points, len(directions))
    held: Points = values[:0]
    series: list[float] = []
    for value in values:
        held = np.concatenate([held, value[None]])
        held = np.unique(held[front(held, directions)], axis=0)
        covered = hypervolume(held, reference, directions)
        # Sums in another order may differ in the last place.
        series.append(max(covered, series[-1]) if series else covered)
    return series


def _area(losses: Points, worst: Points) -> float:
    covered, lowest = 0.0, float(worst[1])
    for first, second in losses[np.lexsort((losses[:, 1], losses[:, 0]))].tolist():
        if second < lowest:
            covered += (float(worst[0]) - first) * (lowest - second)
            lowest = second
    return covered


def _volume(losses: Points, worst: Points) -> float:
    ordered = losses[np.argsort(losses[:, 2], kind="stable")]
    depths = [*ordered[:, 2].tolist(), float(worst[2])]
    return sum(
        (depths[count] - depths[count - 1]) * _area(ordered[:count, :2], worst[:2])
        for count in range(1, len(depths))
        if depths[count] > depths[count - 1]
    )


def _losses(points: ArrayLike, directions: Sequence[str]) -> Points:
    for direction in directions:
        if direction not in ("maximize", "minimize"):
            raise UsageError(f"pareto: got direction {direction!r}, expected maximize or minimize")
    return _values(points, len(directions)) * [-1.0 if d == "maximize" else 1.0 for d in directions]


def _values(points: ArrayLike, columns: int | None) -> Points:
    values = np.asarray(points, np.float64)
    if values.size == 0:
        return np.zeros((0, columns or 0))
    if values.ndim != 2 or (columns is not None and values.shape[1] != columns):
        expected = "points, objectives" if columns is None else f"points, {columns}"
        raise UsageError(f"pareto: got points of shape {list(values.shape)}, expected [{expected}]")
    if not np.isfinite(values).all():
        raise UsageError("pareto: a point is not finite; leave failed trials out")
    return values
