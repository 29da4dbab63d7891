"""Whole units chosen by a criterion, as a variant: the control of unit masks that are drawn at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from secateur.errors import UsageError
from secateur.variants.checks import finite, text, unit_pairs
from secateur.variants.kinds import Variant

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.variants.workbench import Workbench

__all__ = ["UnitsByCriterion"]


@dataclass(frozen=True, repr=False)
class UnitsByCriterion(Variant):
    """The lowest-ranked units of each layer put out zero; what is kept is not multiplied by anything.

    Args:
        sparsity: fraction of each layer's units removed, in [0, 1), rounded down; at least one stays.
        removed: `(layer, units)` pairs: how many units of a layer are removed, in place of the fraction. Layers by
            their name or their weight's, each once. A mapping will do.
        criterion: name of the criterion that ranks the units; its L2 norm for magnitude.

    Of equal scores the lowest index goes first.

    Reference: mask-guided structured pruning (thesis), the L2 baseline: prunes int(sparsity * n) units of each layer.
    """

    sparsity: float = 0.0
    removed: tuple[tuple[str, int], ...] = ()
    criterion: str = "magnitude"
    kind: ClassVar[str] = "units_by_criterion"

    def __post_init__(self) -> None:
        finite("sparsity", self.sparsity, 0.0, 1.0)
        text("criterion", self.criterion)
        given = tuple(self.removed.items()) if isinstance(self.removed, Mapping) else self.removed
        object.__setattr__(self, "removed", unit_pairs("removed", given))

    def apply(self, bench: Workbench) -> None:
        kept = self.kept(bench)
        for target in bench.targets:
            if not bool(kept[target.name].all()):
                bench.multiply_units(target, kept[target.name].double())

    def kept(self, bench: Workbench) -> dict[str, Tensor]:
        """Which units of each target stay, by its name: bool, `[units]`, by the network's present weights."""
        import torch

        from secateur.criteria import CRITERIA
        from secateur.sparsify.ranking import rank

        counts: dict[str, int] = {}
        for layer, count in self.removed:
            name = bench.target(layer).name
            if name in counts:
                raise UsageError(
                    f'{self.kind}: removed has "{name}" twice, {counts[name]} and {count} units; give each layer once'
                )
            counts[name] = count
        shares = {t.name: self._share(t.name, t.units, counts.get(t.name)) for t in bench.targets}
        if not any(shares.values()):
            return {t.name: torch.ones(t.units, dtype=torch.bool) for t in bench.targets}
        found = bench.criteria.get(self.criterion)
        ranking = rank(
            bench.network,
            CRITERIA.load(self.criterion)() if found is None else found,
            granularity="unit",
            targets=bench.targets,
            batches=bench.batches,
            loss=bench.loss,
        )
        kept = ranking.rule.select(ranking.cells, shares, ranking.absolute)
        return {name: keep.cpu() for name, keep in kept.items()}

    def _share(self, name: str, units: int, count: int | None) -> float:
        if count is None:
            return self.sparsity
        if count >= units:
            raise UsageError(f'{self.kind}: "{name}" has {units} units, so 0 to {units - 1} can go, got {count}')
        # Exact: units times this fraction is rounded down with a tolerance.
        return count / units
