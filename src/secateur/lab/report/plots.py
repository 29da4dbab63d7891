"""Plots: accuracy against sparsity and latency, and training curves, as SVG and PNG.

One small figure a panel, so that a page can set them side by side or one below another. Colors are those of
Okabe and Ito, told apart also by marker and dash; the control is always ink, dashed, square. Drawn with
matplotlib's object interface: no pyplot, no global backend, no display.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.core.statistics import mean_interval
from secateur.lab.report.panels import Arm, Panel
from secateur.lab.report.picture import COLORS, INK, MUTED, Picture, draw_figure, plain
from secateur.lab.report.schema import Result, Training
from secateur.lab.report.words import level

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Line", "Style", "accuracy", "curves", "latency", "limits", "lines", "pages", "styles"]

_MARKERS = ("o", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
_CONTROL_DASH = (0, (3.5, 2))
_RING: dict[str, Any] = {"markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.2}
# More lines than this beside the control cannot be told apart in one figure.
_AT_ONCE = 6


@dataclass(frozen=True)
class Style:
    """How one arm is drawn, the same in every figure."""

    color: str
    marker: str
    dash: Any


@dataclass(frozen=True)
class Line:
    """One arm with its label and style."""

    arm: Arm
    label: str
    style: Style


def styles(result: Result) -> dict[str, Style]:
    """A style for each method; the control in ink."""
    base = None if result.baseline is None else result.baseline.label
    found: dict[str, Style] = {}
    for method in result.methods:
        index = len([label for label in found if label != base])
        color, _ = COLORS[index % len(COLORS)]
        found[method.label] = Style(color, _MARKERS[index % len(_MARKERS)], _DASHES[index // len(COLORS) % 4])
        if method.label == base:
            found[method.label] = Style(INK, "s", _CONTROL_DASH)
    return found


def lines(result: Result, panel: Panel) -> list[Line]:
    """The arms of a panel with their styles; a method's second arm gets another marker and dash, or another color
    where all are arms of one method."""
    if len({arm.method for arm in panel.arms}) == 1 < len(panel.arms):
        return _by_arm(panel)
    known = styles(result)
    seen = dict.fromkeys(known, 0)
    found = []
    for arm in panel.arms:
        style, again = known[arm.method], seen[arm.method]
        seen[arm.method] += 1
        if again:
            marker = _MARKERS[(_MARKERS.index(style.marker) + again) % 7] if style.marker != "s" else _MARKERS[-again]
            style = Style(style.color, marker, _DASHES[again % 4])
        found.append(Line(arm, arm.label, style))
    return found


def pages(result: Result, panel: Panel) -> list[tuple[str, list[Line]]]:
    """A panel's lines with the end of a title, over several figures where one would be a tangle.

    Each figure then shows the control and a few others, those that kept most on average first.
    """
    drawn = lines(result, panel)
    if len(drawn) <= _AT_ONCE + 1:
        return [("", drawn)]
    control = next((line for line in drawn if line.style.color == INK), drawn[0])
    others = sorted((line for line in drawn if line is not control), key=lambda line: -_kept(line.arm))
    parts = [others[at : at + _AT_ONCE] for at in range(0, len(others), _AT_ONCE)]
    return [
        (f", {number} of {len(parts)} (best first)", [control, *(_colored(line, i) for i, line in enumerate(part))])
        for number, part in enumerate(parts, start=1)
    ]


def _kept(arm: Arm) -> float:
    """Mean accuracy over all sparsities above zero and all seeds."""
    found = [value for sparsity in arm.points if sparsity > 0 for value in arm.top1(sparsity).values()]
    return sum(found) / len(found) if found else 0.0


def _colored(line: Line, index: int) -> Line:
    return Line(
        line.arm, line.label, Style(COLORS[index % len(COLORS)][0], _MARKERS[index % 7], _DASHES[index // len(COLORS)])
    )


def _by_arm(panel: Panel) -> list[Line]:
    """A color for each arm; the control in ink."""
    control = next((arm for arm in panel.arms if arm.control), panel.arms[0])
    found: list[Line] = []
    for arm in panel.arms:
        index = sum(line.arm is not control for line in found)
        style = Style(COLORS[index % len(COLORS)][0], _MARKERS[index % 7], _DASHES[index // len(COLORS) % 4])
        found.append(Line(arm, arm.label, Style(INK, "s", _CONTROL_DASH) if arm is control else style))
    return found


def accuracy(
    name: str,
    title: str,
    drawn: Sequence[Line],
    chance: float | None,
    limits: tuple[float, float] | None = None,
) -> Picture:
    """Top-1 against the sparsity asked, mean over seeds with its interval; `limits` of y to share an axis."""

    def draw(axes: Axes) -> None:
        levels = sorted({sparsity for line in drawn for sparsity in line.arm.points})
        reach = max((_stretch(value) for value in levels), default=1.0) or 1.0
        for index, line in enumerate(drawn):
            # Arms at one sparsity are set a little apart, else their bars hide each other.
            shift = (index - (len(drawn) - 1) / 2) * 0.011 * reach
            tried = sorted(line.arm.points)
            _bars(axes, line, [_stretch(value) + shift for value in tried], tried)
        _chance(axes, chance)
        ticks = _thin([_stretch(value) for value in levels], 0.085 * reach)
        axes.set_xticks([_stretch(levels[at]) for at in ticks], [level(levels[at])[:-2] for at in ticks])
        axes.set_xlabel("sparsity asked, % (spaced by log of what is kept)")
        axes.set_ylabel("top-1, %")
        if limits is not None:
            axes.set_ylim(*limits)

    caption = "Mean over seeds; bars are 95 % intervals (" + "; ".join(_methods(drawn)) + ")."
    if chance is not None:
        caption += f" Dotted: guessing, {100 * chance:.3g} %."
    alt = f"Accuracy against sparsity, {title}, for {', '.join(line.label for line in drawn)}"
    return draw_figure(name, title, draw, caption, alt)


def limits(panels: Sequence[Panel], chance: float | None) -> tuple[float, float]:
    """One y range for several panels, wide enough for every interval."""
    ends = [] if chance is None else [100 * chance]
    for arm in (arm for panel in panels for arm in panel.arms):
        for sparsity in arm.points:
            got = mean_interval(list(arm.top1(sparsity).values()), arm.count(sparsity))
            ends += [100 * end for end in (got.mean, got.low, got.high) if end is not None]
    low, high = min(ends), max(ends)
    room = max(0.04 * (high - low), 0.5)
    return max(low - room, -2.0), min(high + room, 102.0)


def latency(name: str, title: str, drawn: Sequence[Line], chance: float | None) -> list[Picture]:
    """Top-1 against measured latency, one figure for each place it was measured; none where nothing was."""
    rows = [row for line in drawn for points in line.arm.points.values() for row in points.values()]
    places = list(dict.fromkeys(row.latency.where for row in rows if row.latency is not None))
    return [
        _latency(f"{name}-{at}" if len(places) > 1 else name, title, drawn, chance, place)
        for at, place in enumerate(places, 1)
    ]


def _latency(name: str, title: str, drawn: Sequence[Line], chance: float | None, place: str) -> Picture:
    def draw(axes: Axes) -> None:
        for line in drawn:
            tried, centers, reach = [], [], []
            for sparsity in sorted(line.arm.points):
                found = [row.latency for row in line.arm.points[sparsity].values() if row.latency is not None]
                found = [item for item in found if item.where == place]
                if found:
                    center = sum(item.median_ms for item in found) / len(found)
                    low = min(item.median_ms if item.low_ms is None else item.low_ms for item in found)
                    high = max(item.median_ms if item.high_ms is None else item.high_ms for item in found)
                    tried.append(sparsity)
                    centers.append(center)
                    reach.append((max(center - low, 0.0), max(high - center, 0.0)))
            if tried:
                _bars(axes, line, centers, tried, reach)
                # A ring around the first point tells the direction of the line.
                axes.plot(centers[:1], [100 * _mean(line.arm, tried[0])], "o", color=line.style.color, **_RING)
        _chance(axes, chance)
        axes.set_xlim(left=0)
        axes.set_xlabel("latency, ms (median)")
        axes.set_ylabel("top-1, %")

    caption = (
        f"Measured on {place}. Lines join the sparsities in ascending order, from the ringed point on. Horizontal "
        "bars span the 95 % intervals of all seeds, vertical bars are 95 % intervals over seeds."
    )
    return draw_figure(name, title, draw, caption, f"Accuracy against measured latency on {place}, {title}")


def curves(name: str, result: Result) -> list[Picture]:
    """Training loss and top-1 by epoch: mean over seeds, each seed faint behind it."""
    trainings = [item for item in result.trainings or [] if item.history]
    known = styles(result)
    found = []
    for key, what, scale in (("loss", "training loss", 1.0), ("top1", "top-1, %", 100.0)):
        if any(_series(item, key) for item in trainings):
            drawn = [item for item in trainings if item.method in known]
            found.append(_curve(f"{name}-{key}", what, drawn, known, key, scale))
    return found


def _curve(
    name: str, what: str, trainings: Sequence[Training], known: dict[str, Style], key: str, scale: float
) -> Picture:
    def draw(axes: Axes) -> None:
        from matplotlib.ticker import MaxNLocator

        for method, style in known.items():
            runs = [_series(item, key) for item in trainings if item.method == method]
            runs = [run for run in runs if run]
            if not runs:
                continue
            for run in runs if len(runs) > 1 else []:
                axes.plot(list(run), [scale * y for y in run.values()], color=style.color, alpha=0.3, linewidth=0.8)
            shared = sorted(set.intersection(*(set(run) for run in runs)))
            means = [scale * sum(run[epoch] for run in runs) / len(runs) for epoch in shared]
            few = style.marker if len(shared) <= 12 else ""
            axes.plot(shared, means, color=style.color, linestyle=style.dash, marker=few, label=plain(method))
        axes.set_xlabel("epoch")
        axes.set_ylabel(what)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    title = what.removesuffix(", %")
    return draw_figure(name, f"{title} while training", draw, "Mean over seeds; each seed faint.", f"{title} by epoch")


def _series(training: Training, key: str) -> dict[int, float]:
    values = {item.epoch: getattr(item, key) for item in training.history or []}
    return {epoch: value for epoch, value in values.items() if value is not None}


def _mean(arm: Arm, sparsity: float) -> float:
    values = arm.top1(sparsity).values()
    return sum(values) / len(values)


def _bars(
    axes: Axes,
    line: Line,
    xs: Sequence[float],
    tried: Sequence[float],
    reach: Sequence[tuple[float, float]] | None = None,
) -> None:
    got = [mean_interval(list(line.arm.top1(value).values()), line.arm.count(value)) for value in tried]
    down = [0.0 if item.low is None else 100 * max(item.mean - item.low, 0.0) for item in got]
    up = [0.0 if item.high is None else 100 * max(item.high - item.mean, 0.0) for item in got]
    axes.errorbar(
        xs,
        [100 * item.mean for item in got],
        yerr=[down, up],
        xerr=None if reach is None else list(zip(*reach, strict=True)),
        color=line.style.color,
        marker=line.style.marker,
        linestyle=line.style.dash,
        label=plain(line.label),
        capsize=2.5,
        elinewidth=1.0,
        capthick=1.0,
    )


def _methods(drawn: Sequence[Line]) -> list[str]:
    found: dict[str, None] = {}
    for line in drawn:
        for sparsity in line.arm.points:
            found[mean_interval(list(line.arm.top1(sparsity).values()), line.arm.count(sparsity)).method] = None
    return list(found)


def _chance(axes: Axes, chance: float | None) -> None:
    if chance is not None:
        axes.axhline(100 * chance, color=MUTED, linestyle=":", linewidth=1.2)


def _stretch(sparsity: float) -> float:
    return -math.log(max(1 - sparsity, 1e-6))


def _thin(positions: Sequence[float], gap: float) -> list[int]:
    """Indices of the ticks that fit: the last one always, then leftwards each at least `gap` away."""
    kept: list[int] = []
    for index in reversed(range(len(positions))):
        if not kept or positions[kept[-1]] - positions[index] >= gap:
            kept.append(index)
    return kept[::-1]
