"""Charts that sections share: lines with bars, and cells colored by their value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from secateur.lab.report.picture import COLORS, INK, MUTED, Picture, draw_figure, plain
from secateur.lab.report.words import level

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Series", "chart", "heat", "sparsity_ticks", "stretched"]

_MARKERS = ("o", "^", "D", "v", "P", "X", "*")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
# Cells stay pale, so that the number on them can be read; the first is not the page's white, which it makes dark.
_PALE, _DEEP, _ON_CELL = "#fdfdfd", "#f3a26d", "#111111"


@dataclass(frozen=True)
class Series:
    """One line.

    Args:
        label: in the legend; "" for none.
        xs, ys: its points.
        low, high: ends of its bars, where there are some; None where a point has none.
        role: what it is to the others: the control is ink and dashed, what is faint only stands behind.
    """

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    role: Literal["one of many", "control", "faint"] = "one of many"


def chart(
    name: str,
    title: str,
    series: Sequence[Series],
    labels: tuple[str, str],
    caption: str,
    *,
    scales: tuple[str, str] = ("linear", "linear"),
    ticks: tuple[Sequence[float], Sequence[str]] | None = None,
    level_at: float | None = None,
    marks: Sequence[float] = (),
) -> Picture:
    """Lines with bars.

    Args:
        labels: of the axes.
        scales: of the axes, linear or log.
        ticks: of x: where, and what they say.
        level_at: a dotted horizontal line.
        marks: dotted vertical lines.
    """

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import NullLocator

        colored = 0
        for one in series:
            look: dict[str, Any] = {"color": MUTED, "linewidth": 0.8, "alpha": 0.6}
            if one.role == "control":
                look = {"color": INK, "marker": "s", "linestyle": (0, (3.5, 2))}
            elif one.role == "one of many":
                look = {
                    "color": COLORS[colored % len(COLORS)][0],
                    "marker": _MARKERS[colored % len(_MARKERS)],
                    "linestyle": _DASHES[colored // len(COLORS) % len(_DASHES)],
                }
                colored += 1
            label = plain(one.label) if one.label else "_"
            if not one.low:
                axes.plot(one.xs, one.ys, label=label, **look)
                continue
            ends = list(zip(one.ys, one.low, one.high, strict=True))
            down = [0.0 if low is None else max(y - low, 0.0) for y, low, _ in ends]
            up = [0.0 if high is None else max(high - y, 0.0) for y, _, high in ends]
            axes.errorbar(
                one.xs, one.ys, yerr=[down, up], label=label, capsize=2.5, elinewidth=1.0, capthick=1.0, **look
            )
        axes.set_xscale(scales[0])
        axes.set_yscale(scales[1])
        for axis, scale in ((axes.xaxis, scales[0]), (axes.yaxis, scales[1])):
            if scale == "log":
                _powers(axis)
        if ticks is not None:
            axes.set_xticks(list(ticks[0]), list(ticks[1]))
            axes.xaxis.set_minor_locator(NullLocator())
        if level_at is not None:
            axes.axhline(level_at, color=MUTED, linestyle=":", linewidth=1.2)
        for mark in marks:
            axes.axvline(mark, color=MUTED, linestyle=":", linewidth=1.2)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])

    named = ", ".join(one.label for one in series if one.label)
    return draw_figure(name, title, draw, caption, f"{title}: {labels[1]} against {labels[0]}, for {named}")


def _powers(axis: Any) -> None:
    """Numbers as they are written: powers would need the mathematics that labels are not parsed for."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def heat(
    name: str,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
    caption: str,
) -> Picture:
    """Cells, the deeper in color the higher their value; 0 and below is pale."""

    def draw(axes: Axes) -> None:
        from matplotlib.colors import LinearSegmentedColormap

        top = max((value for row in values for value in row), default=0.0)
        colors = LinearSegmentedColormap.from_list("cells", [_PALE, _DEEP])
        axes.pcolormesh(list(values), cmap=colors, vmin=0.0, vmax=top or 1.0, edgecolors="#eeeeee", linewidth=0.8)
        for y, row in enumerate(texts):
            for x, text in enumerate(row):
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9, color=_ON_CELL)
        axes.set_xticks([x + 0.5 for x in range(len(columns))], list(columns))
        axes.set_yticks([y + 0.5 for y in range(len(rows))], [plain(row) for row in rows])
        axes.tick_params(length=0)
        axes.grid(False)
        axes.invert_yaxis()
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        # A row is never lower than its letters.
        axes.get_figure(root=True).set_figheight(max(2.2, 0.9 + 0.24 * len(rows)))  # type: ignore[union-attr]

    return draw_figure(name, title, draw, caption, f"{title}: {len(rows)} rows by {len(columns)} columns")


def stretched(sparsity: float) -> float:
    """Where a sparsity lies on an axis spaced by the log of what is kept."""
    return -math.log(max(1 - sparsity, 1e-6))


def sparsity_ticks(sparsities: Sequence[float]) -> tuple[list[float], list[str]]:
    """Ticks for such an axis, in percent; those that would touch the next one to the right are left out."""
    places = sorted(set(sparsities))
    gap = 0.085 * (stretched(places[-1]) or 1.0)
    kept: list[float] = []
    for value in reversed(places):
        if not kept or stretched(kept[-1]) - stretched(value) >= gap:
            kept.append(value)
    kept.reverse()
    return [stretched(value) for value in kept], [level(value)[:-2] for value in kept]
