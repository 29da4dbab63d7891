"""The paper that plots are drawn on: size, type, colors, and the way from a figure to a page and to files."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["COLORS", "INK", "MUTED", "Picture", "draw_figure", "plain"]

# (light page, dark page); after the fifth method colors repeat with another marker and dash.
COLORS = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#ff8f4a"),
    ("#009e73", "#2fcfa0"),
    ("#b0559a", "#e39bcb"),
    ("#a67c00", "#f0c541"),
)
INK, MUTED, _GRID, _PAPER = "#1b1f24", "#5b6571", "#d5dae1", "#ffffff"
_SIZE = (5.0, 3.7)  # inches; 360 pt wide, so that a phone shows the text at its own size
_RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.facecolor": _PAPER,
    "axes.facecolor": _PAPER,
    "savefig.facecolor": _PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "secateur",
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure.

    Args:
        name: file name without ending.
        caption: what it shows and how its intervals were made.
        alt: one sentence for those who cannot see it.
        svg, png: the files' content, on white.
    """

    name: str
    caption: str
    alt: str
    svg: str
    png: bytes

    def inline(self) -> str:
        """The SVG for a page: no size of its own, the page's colors, ids that no other figure has."""
        body = self.svg[self.svg.index("<svg") :]
        body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
        body = re.sub(r' (?:width|height)="[\d.]+pt"', "", body, count=2)
        prefix = re.sub(r"\W", "-", self.name)
        body = re.sub(r'\bid="', f'id="{prefix}-', body)
        body = re.sub(r"url\(#", f"url(#{prefix}-", body)
        body = re.sub(r'href="#', f'href="#{prefix}-', body)
        body = body.replace(f"fill: {_PAPER}", "fill: none").replace("'DejaVu Sans'", "system-ui")
        for number, (light, _) in enumerate(COLORS, 1):
            body = body.replace(light, f"var(--series-{number})")
        for color, name in ((INK, "ink"), (MUTED, "muted"), (_GRID, "grid")):
            body = body.replace(color, f"var(--{name})")
        return body.replace("<svg", '<svg aria-hidden="true"', 1)


def plain(text: str) -> str:
    """A label that matplotlib and XML take as it is: no control characters, no leading underscore."""
    text = "".join(char if char.isprintable() else "?" for char in text)
    return " " + text if text.startswith("_") else text


def draw_figure(name: str, title: str, draw: Callable[[Axes], None], caption: str, alt: str) -> Picture:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_RC), warnings.catch_warnings():
        # What the font lacks is drawn as boxes in the PNG; the SVG and the tables have it.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(plain(title), loc="left")
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            columns = 2 if max(len(label) for label in labels) <= 24 else 1
            figure.set_figheight(_SIZE[1] + 0.19 * max(0, math.ceil(len(labels) / columns) - 2))
            figure.legend(handles, labels, loc="outside lower left", ncols=columns)
        svg, png = io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        # The layout is found once; finding it again for the PNG would cost as much as drawing it.
        figure.set_layout_engine("none")
        figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    return Picture(name, caption, alt, svg.getvalue().decode("utf-8"), png.getvalue())
