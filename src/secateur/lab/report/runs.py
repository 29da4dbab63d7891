"""Several runs side by side: what differs between them, paired by the seeds they share."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.core.statistics import Interval, holm, mean_interval, paired_difference
from secateur.lab.report.panels import Arm, Panel
from secateur.lab.report.schema import Result
from secateur.lab.report.tables import Table
from secateur.lab.report.verdict import ALPHA
from secateur.lab.report.words import NOT_MEASURED, level, many, percent, points, span

__all__ = ["between", "overview", "run_names"]


def run_names(results: Sequence[Result]) -> list[str]:
    """A name for each run, no two alike: its own, then with its recipe's hash, then numbered."""
    names = [result.name for result in results]
    if len(set(names)) < len(names):
        names = [f"{item.name} {(item.recipe_hash or '')[:8]}".strip() for item in results]
    if len(set(names)) < len(names):
        names = [f"{name} #{at}" for at, name in enumerate(names, 1)]
    return names


def overview(named: Sequence[tuple[str, Result]]) -> Table:
    """One line a run."""
    rows = []
    for name, result in named:
        base = result.baseline
        values = [] if base is None else list(result.unpruned(base.label).values())
        dense = NOT_MEASURED if not values else percent(mean_interval(values).mean)
        seeds = len({row.seed for row in result.rows})
        time = NOT_MEASURED if result.wall_seconds is None else f"{result.wall_seconds:.0f} s"
        methods = ", ".join(method.label for method in result.methods)
        rows.append((name, methods, str(seeds), dense, time, (result.recipe_hash or "not recorded")[:12]))
    return Table("Runs", ("Run", "Methods", "Seeds", "Dense control", "Wall time", "Recipe"), tuple(rows))


def between(named: Sequence[tuple[str, Result]]) -> tuple[Table | None, str]:
    """Each later run minus the first, for the same method, granularity, criterion, scope and sparsity.

    Returns the table (None where nothing can be compared) and a note on what was compared and how.
    """
    (first_name, first), *rest = named
    found: list[tuple[str, Panel, Arm, float, Interval]] = []
    skipped = 0
    for name, other in rest:
        for panel in first.panels:
            for arm in panel.arms:
                match = _match(other, panel, arm)
                for sparsity in sorted(arm.points):
                    a = match.top1(sparsity) if match else {}
                    b = arm.top1(sparsity)
                    if match is None or not a:
                        continue
                    count = arm.count(sparsity)
                    # Runs on test sets of different size cannot have seen the same images.
                    if not a.keys() & b.keys() or count != match.count(sparsity):
                        skipped += 1
                        continue
                    found.append((name, panel, arm, sparsity, paired_difference(a, b, count=count)))
    note = f"Each run minus {first_name}, paired by seed; Holm-corrected over {many(len(found), 'comparison')}."
    note += " It assumes that both runs used the same test images."
    if skipped:
        note += f" Not compared: {many(skipped, 'point')} without a shared seed or with unequal test sets."
    if not found:
        return None, f"Nothing to pair with {first_name}: no shared method, sparsity, seed and test-set size."
    adjusted = holm([1.0 if item[4].p is None else item[4].p for item in found])
    rows = tuple(
        (
            f"{name} vs {first_name}",
            arm.label,
            panel.granularity + (", trained again" if panel.retrained else ""),
            level(sparsity),
            points(got.mean, signed=True),
            span(got),
            str(got.n),
            "no test" if got.p is None else f"{p:.3f}",
            "not resolved" if p >= ALPHA or not got.resolved else "more" if got.mean > 0 else "less",
        )
        for (name, panel, arm, sparsity, got), p in zip(found, adjusted, strict=True)
    )
    head = (
        "Runs",
        "Method",
        "Granularity",
        "Sparsity",
        "Points",
        "95 % interval",
        "Pairs",
        "p (Holm)",
        "Verdict",
    )
    return Table("Differences between runs", head, rows), note


def _match(other: Result, panel: Panel, arm: Arm) -> Arm | None:
    for candidate in other.panels:
        if (candidate.granularity, candidate.retrained) == (panel.granularity, panel.retrained):
            for item in candidate.arms:
                if (item.method, item.criterion, item.scope) == (arm.method, arm.criterion, arm.scope):
                    return item
    return None
