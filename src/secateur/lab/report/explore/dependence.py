"""The picture and the words of the dependence between weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from secateur.lab.report.picture import INK, Picture, draw_figure, plain
from secateur.lab.report.tables import Table
from secateur.lab.report.words import level, many, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["dependence", "dependence_pictures"]

# Layers that have their name along an axis; more have their number.
_NAMED = 6
# Orders of magnitude that the colors tell apart, at most.
_ORDERS = 4


def dependence(part: Mapping[str, Any]) -> tuple[list[str], list[Table], list[str]]:
    """Sentences, tables and notes."""
    if part["of"] == "nothing":
        return [f"Dependence between weights: not to be had ({part['none']})."], [], []
    note = (
        "Dependence: w_i H_ij w_j, H the Hessian of the mean loss over the images, at the whole network's weights; of "
        "two layers the sum over their pairs of weights. It holds for small changes."
    )
    if part["of"] == "layers":
        return [_strongest(part)], [], [note]
    lines = [
        f"Dependence among {part['weights']:,} weights of {', '.join(part['layers'])}: {percent(part['own'])} of the "
        f"sizes |w_i H_ij w_j| are each weight's own, {percent(part['within'])} lie within layers."
    ]
    rows = []
    for cell in part["cells"]:
        numbers = (cell["removed"], cell["across"], cell["across_by_chance"], cell["kept"])
        rows.append((level(cell["sparsity"]), percent(cell["share_removed"]), *(percent(x) for x in numbers)))
    if rows:
        cell = part["cells"][-1]
        lines.append(
            f"Dependence, {level(cell['sparsity'])} removed: {percent(cell['across'])} of it is between weights that "
            f"go and weights that stay; a random choice would have {percent(cell['across_by_chance'])}."
        )
    head = ("Sparsity", "Of these weights go", "Both go", "One goes", "One goes, by chance", "Both stay")
    return lines, [Table("Shares of the sizes |w_i H_ij w_j| among pairs", head, tuple(rows))] if rows else [], [note]


def _strongest(part: Mapping[str, Any]) -> str:
    layers, matrix = part["layers"], part["matrix"]
    sizes = {(a, b): abs(matrix[a][b]) for a in range(len(layers)) for b in range(len(layers))}
    total = sum(sizes.values())
    own = sum(sizes[a, a] for a in range(len(layers))) / total
    said = f"Dependence between {many(len(layers), 'layer')}: {percent(own)} of the sizes are layers' own"
    if len(layers) < 2:
        return f"{said}."
    a, b = max((pair for pair in sizes if pair[0] < pair[1]), key=lambda pair: sizes[pair])
    return f'{said}; the two that depend most on each other are "{layers[a]}" and "{layers[b]}" ({matrix[a][b]:+.3g}).'


def dependence_pictures(part: Mapping[str, Any], name: str) -> list[Picture]:
    """The matrix as shades."""
    sizes = [[abs(value) for value in row] for row in part["matrix"]]
    top = max((value for row in sizes for value in row), default=0.0)
    if not top:
        return []
    floor = max(top / 10**_ORDERS, min((v for row in sizes for v in row if 0 < v < top), default=top / 10))
    layers = part["layers"]
    starts = part["starts"] if part["of"] == "weights" else list(range(len(layers)))

    def draw(axes: Axes) -> None:
        from matplotlib.colors import LogNorm

        shades = axes.imshow([[max(v, floor) for v in row] for row in sizes], cmap="Blues", norm=LogNorm(floor, top))
        axes.grid(visible=False)
        ends = [*starts[1:], len(sizes)]
        for end in ends[:-1] if part["of"] == "weights" else ():
            axes.axhline(end - 0.5, color=INK, linewidth=0.7)
            axes.axvline(end - 0.5, color=INK, linewidth=0.7)
        at = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
        names = [plain(layer) for layer in layers] if len(layers) <= _NAMED else _numbers(len(layers))
        axes.set_xticks(at, names)
        axes.set_yticks(at, names)
        axes.set_xlabel("layer")
        bar = axes.figure.colorbar(shades, ax=axes)
        bar.set_ticks([top, floor], labels=[f"{top:.1g}", f"{floor:.1g} or less"])
        bar.ax.minorticks_off()

    what = (
        "mean |w_i H_ij w_j| of neighboring weights" if part["of"] == "weights" else "|sum of w_i H_ij w_j| of layers"
    )
    caption = f"Shades: {what}, on a log scale. Layers are in the network's order."
    return [draw_figure(name, f"Dependence between {part['of']}", draw, caption, f"Matrix of {what}")]


def _numbers(count: int) -> Sequence[str]:
    step = max(1, count // 5)
    return [str(number + 1) if number % step == 0 else "" for number in range(count)]
