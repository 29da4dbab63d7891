"""Rows in the shape they are plotted, compared and tabulated in: panels of arms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.lab.report.schema import Row

__all__ = ["Arm", "Panel", "group"]


@dataclass(frozen=True)
class Arm:
    """One line of a plot: a method with the criterion and scope it was pruned by, at each sparsity."""

    method: str
    criterion: str
    scope: str
    label: str
    points: Mapping[float, Mapping[int, Row]]

    def top1(self, sparsity: float) -> dict[int, float]:
        """Accuracy by seed; empty where this sparsity was not tried."""
        return {seed: row.top1 for seed, row in self.points.get(sparsity, {}).items()}

    @property
    def control(self) -> bool:
        """Whether the recipe says that the other arms of its method are compared with this one."""
        return any(row.control for by_seed in self.points.values() for row in by_seed.values())

    def count(self, sparsity: float) -> int | None:
        """Test images a seed, where every row tells."""
        counts = [row.count for row in self.points.get(sparsity, {}).values()]
        known = [count for count in counts if count is not None]
        return min(known) if known and len(known) == len(counts) else None


@dataclass(frozen=True)
class Panel:
    """All arms of one granularity, as pruned or trained again afterwards."""

    granularity: str
    retrained: bool
    arms: tuple[Arm, ...]

    @property
    def title(self) -> str:
        """In words, for headings and plots."""
        return f"pruned by {self.granularity}" + (", trained again" if self.retrained else "")

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Every sparsity asked of any arm, ascending."""
        return tuple(sorted({sparsity for arm in self.arms for sparsity in arm.points}))


def group(rows: Iterable[Row]) -> tuple[Panel, ...]:
    """Rows by granularity and whether trained again, then by method, criterion and scope, in order of appearance."""
    tree: dict[tuple[str, bool], dict[tuple[str, str, str], dict[float, dict[int, Row]]]] = {}
    for row in rows:
        arms = tree.setdefault((row.granularity, row.retrained), {})
        points = arms.setdefault((row.method, row.criterion, row.scope), {})
        points.setdefault(round(row.sparsity_asked, 6), {})[row.seed] = row
    return tuple(
        Panel(granularity, tuned, tuple(Arm(*key, _label(key, arms), points) for key, points in arms.items()))
        for (granularity, tuned), arms in tree.items()
    )


def _label(key: tuple[str, str, str], arms: Iterable[tuple[str, str, str]]) -> str:
    """The method, and what else tells this arm from the same method's others."""
    same = [other for other in arms if other[0] == key[0]]
    by_criterion = [other for other in same if other[1] == key[1]]
    extra = [key[1]] if len({other[1] for other in same}) > 1 else []
    extra += [key[2]] if len(by_criterion) > 1 else []
    return key[0] + (f" ({', '.join(extra)})" if extra else "")
