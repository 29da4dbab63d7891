"""Tables of the report: as cells for the page, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from secateur.core.statistics import mean_interval
from secateur.lab.report.panels import Arm, Panel
from secateur.lab.report.schema import Result, Row
from secateur.lab.report.verdict import Comparison
from secateur.lab.report.words import NOT_MEASURED, amount, level, percent, points, span

__all__ = [
    "Heat",
    "Table",
    "accuracies",
    "achieved",
    "csv_of",
    "csv_text",
    "densities",
    "differences",
    "layers_csv",
    "trainings",
]


@dataclass(frozen=True)
class Table:
    """Head and rows of text; the first column names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Heat:
    """Density of each layer at each sparsity, mean over seeds; None where it was not measured."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


def accuracies(panel: Panel) -> Table:
    """Top-1 by sparsity (rows) and arm (columns): mean and interval over seeds."""
    rows = []
    for sparsity in panel.sparsities:
        cells = []
        for arm in panel.arms:
            values = list(arm.top1(sparsity).values())
            if not values:
                cells.append(NOT_MEASURED)
                continue
            got = mean_interval(values, arm.count(sparsity))
            ends = "no interval" if got.low is None else f"{span(got)}, n={got.n}"
            cells.append(f"{percent(got.mean)} ({ends})")
        rows.append((level(sparsity), *cells))
    return Table(f"Top-1, {panel.title}", ("Sparsity", *(arm.label for arm in panel.arms)), tuple(rows))


def achieved(panel: Panel) -> Table:
    """Asked against achieved for every arm and sparsity."""
    rows = []
    for arm in panel.arms:
        for sparsity, by_seed in sorted(arm.points.items()):
            found = list(by_seed.values())
            kept, total = _average(found, "params_kept"), _average(found, "params_total")
            share = NOT_MEASURED if kept is None or not total else f"{amount(kept)} of {amount(total)}"
            squeeze = NOT_MEASURED if not kept or total is None else f"{total / kept:.2f}x"
            macs = amount(_average(found, "macs"))
            rows.append((arm.label, level(sparsity), _range(found), share, squeeze, macs))
    head = ("Method", "Sparsity asked", "Sparsity got", "Parameters kept", "Compression", "MACs (batch 1)")
    return Table(_capital(panel.title), head, tuple(rows))


def differences(comparisons: Iterable[Comparison]) -> Table:
    """Every comparison with the control, picked or not."""
    rows = [
        (
            item.name,
            item.against,
            f"{item.panel.granularity}{', trained again' if item.panel.retrained else ''}",
            level(item.sparsity),
            points(item.interval.mean, signed=True),
            span(item.interval),
            str(item.interval.n),
            _p(item.own, item),
            _p(item.all, item),
            item.word,
        )
        for item in comparisons
    ]
    head = (
        "Method",
        "Control",
        "Granularity",
        "Sparsity",
        "Points",
        "95 % interval",
        "Pairs",
        "p (Holm, own)",
        "p (Holm, all)",
        "Verdict",
    )
    return Table("Every comparison with the control", head, tuple(rows))


def trainings(result: Result) -> Table:
    """What each training took and where it ended."""
    rows = [
        (
            item.method,
            str(item.seed),
            amount(item.steps),
            NOT_MEASURED if item.seconds is None else f"{item.seconds:.1f} s",
            NOT_MEASURED if item.final_loss is None else f"{item.final_loss:.4f}",
            percent(item.top1),
        )
        for item in result.trainings or []
    ]
    return Table("Trainings", ("Method", "Seed", "Steps", "Time", "Final loss", "Top-1"), tuple(rows))


def densities(panel: Panel) -> list[Heat]:
    """One heat table an arm; arms without per-layer counts are left out."""
    found = []
    for arm in panel.arms:
        levels = [s for s in sorted(arm.points) if any(row.layers for row in arm.points[s].values())]
        names = list(
            dict.fromkeys(layer.name for s in levels for row in arm.points[s].values() for layer in row.layers or [])
        )
        if names:
            table = {sparsity: _density(arm, sparsity) for sparsity in levels}
            rows = tuple((name, tuple(table[sparsity].get(name) for sparsity in levels)) for name in names)
            found.append(Heat(arm.label, tuple(level(sparsity) for sparsity in levels), rows))
    return found


def csv_text(results: Sequence[tuple[str, Result, Sequence[Comparison]]]) -> str:
    """One line a run, arm and sparsity: means, intervals, comparison with the control; empty = not measured."""
    head = [
        *(
            "run",
            "recipe_hash",
            "granularity",
            "retrained",
            "method",
            "criterion",
            "scope",
            "sparsity_asked",
        ),
        *(
            "sparsity_got",
            "seeds",
            "test_images",
            "top1_mean",
            "top1_low",
            "top1_high",
            "top1_interval",
            "top5_mean",
        ),
        *("params_total", "params_kept", "macs", "latency_ms", "control", "difference", "difference_low"),
        *("difference_high", "difference_interval", "pairs", "p", "p_holm_own", "p_holm_all"),
    ]
    lines: list[list[object]] = []
    for name, result, comparisons in results:
        by_key = {(id(item.arm), item.sparsity): item for item in comparisons}
        for panel in result.panels:
            for arm in panel.arms:
                for sparsity, by_seed in sorted(arm.points.items()):
                    rows = list(by_seed.values())
                    got = mean_interval(list(arm.top1(sparsity).values()), arm.count(sparsity))
                    times = [row.latency.median_ms for row in rows if row.latency is not None]
                    item = by_key.get((id(arm), sparsity))
                    lines.append(
                        [
                            *(name, result.recipe_hash, panel.granularity, panel.retrained, arm.method),
                            *(arm.criterion, arm.scope, sparsity, _average(rows, "sparsity_got"), len(rows)),
                            *(arm.count(sparsity), got.mean, got.low, got.high, got.method),
                            *(_average(rows, key) for key in ("top5", "params_total", "params_kept", "macs")),
                            sum(times) / len(times) if times else None,
                            *_against(item),
                        ]
                    )
    return csv_of(head, lines)


def layers_csv(results: Sequence[tuple[str, Result]]) -> str:
    """One line a run, arm, sparsity and layer: density, mean over seeds."""
    head = [
        "run",
        "granularity",
        "retrained",
        "method",
        "criterion",
        "scope",
        "sparsity_asked",
        "layer",
        "density",
    ]
    lines: list[list[object]] = [
        [
            name,
            panel.granularity,
            panel.retrained,
            arm.method,
            arm.criterion,
            arm.scope,
            sparsity,
            layer,
            density,
        ]
        for name, result in results
        for panel in result.panels
        for arm in panel.arms
        for sparsity in sorted(arm.points)
        for layer, density in _density(arm, sparsity).items()
    ]
    return csv_of(head, lines)


def _against(item: Comparison | None) -> list[object]:
    if item is None:
        return [None] * 9
    got = item.interval
    return [item.against, got.mean, got.low, got.high, got.method, got.n, got.p, item.own, item.all]


def csv_of(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A line for the head and one for each of the others; numbers to six digits, nothing for None."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for line in lines:
        writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in line])
    return text.getvalue()


def _density(arm: Arm, sparsity: float) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for row in arm.points[sparsity].values():
        for layer in row.layers or []:
            found.setdefault(layer.name, []).append(layer.kept / layer.total)
    return {name: sum(values) / len(values) for name, values in found.items()}


def _average(rows: Sequence[Row], key: str) -> float | None:
    """Mean over seeds, None unless every seed has it."""
    values = [getattr(row, key) for row in rows]
    return None if None in values or not values else sum(values) / len(values)


def _range(rows: Sequence[Row]) -> str:
    values = [row.sparsity_got for row in rows if row.sparsity_got is not None]
    if len(values) < len(rows):
        return NOT_MEASURED
    low, high = percent(min(values), 2), percent(max(values), 2)
    return low if low == high else f"{low[:-2]}..{high}"


def _p(value: float, item: Comparison) -> str:
    if item.interval.p is None:
        return "no test"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
