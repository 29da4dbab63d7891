"""Populations pruned with noise: where it pays, where it does not, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from secateur.lab.report.explore.view import View
from secateur.lab.report.picture import COLORS, INK, Picture, draw_figure
from secateur.lab.report.tables import Table
from secateur.lab.report.words import level, many, percent, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LEVEL", "pays", "view"]

# What Holm's correction over a section leaves below this is not taken for chance.
LEVEL = 0.05
_MARKERS = ("o", "^", "D", "v", "P", "X", "*")
_WORDS = {
    "noisy mask, plain weights": "noisy mask on plain weights",
    "plain mask, noisy weights": "plain mask on noisy",
}


def view(section: Mapping[str, Any], name: str) -> View:
    """What a noise section found."""
    cells = section["cells"]
    lines = [*_findings(section), *_confirmed(section), *_crossings(section), *_transfers(cells)]
    tables = [_gains(cells), _accuracies(section)]
    if any(cell["transfer"] for cell in cells):
        tables.append(_exchanged(cells))
    return View(
        title=section["title"],
        lines=tuple(lines),
        pictures=(_picture(section, name),),
        tables=tuple(tables),
        notes=(_note(section),),
    )


def pays(cell: Mapping[str, Any]) -> bool:
    """Whether noise gains what neither its seeds nor the images explain."""
    return cell["p_gain"] < LEVEL


def _harms(cell: Mapping[str, Any]) -> bool:
    return cell["p_loss"] < LEVEL


def _findings(section: Mapping[str, Any]) -> list[str]:
    cells = section["cells"]
    good, bad = [c for c in cells if pays(c)], [c for c in cells if _harms(c)]
    unclear = len(cells) - len(good) - len(bad)
    lines = [
        f"Noise pays in {len(good)} of {many(len(cells), 'cell')} of sigma and sparsity and harms in {len(bad)}; in "
        f"{unclear}, {many(section['count'], 'image')} and {many(len(cells[0]['accuracies']), 'network')} a cell show "
        "no difference."
    ]
    networks, enough = len(cells[0]["accuracies"]), math.ceil(math.log2(len(cells) / LEVEL) + 1e-9)
    if networks < enough:
        lines.append(
            f"It could not be seen to pay: with {many(networks, 'network')} a cell no p-value comes below {LEVEL:g} "
            f"over {many(len(cells), 'cell')}; {enough} or more would do."
        )
    best = max(cells, key=lambda cell: cell["gain"])
    if best["gain"] > 0:
        lines.append(f"Largest gain: {_cell(best)}.")
    else:
        lines.append(f"No cell gains anything; the least loss: {_cell(best)}.")
    return lines


def _cell(cell: Mapping[str, Any]) -> str:
    return (
        f"{points(cell['gain'], signed=True)} points ({_ends(cell)}) with sigma {cell['sigma']:g} at sparsity "
        f"{level(cell['sparsity'])}, from {percent(cell['plain'])} without noise to a median of "
        f"{percent(cell['median'])}{_enclosed(cell)}; p {_p(cell['p_gain'])}"
    )


def _ends(cell: Mapping[str, Any]) -> str:
    if cell["gain_low"] is None:
        return "no interval"
    return f"{points(cell['gain_low'], signed=True)}..{points(cell['gain_high'], signed=True)}"


def _enclosed(cell: Mapping[str, Any]) -> str:
    low, high = cell["median_low"], cell["median_high"]
    return "" if low is None else f" ({points(low)}..{points(high)})"


def _p(value: float) -> str:
    return f"{value:.2g}"


def _confirmed(section: Mapping[str, Any]) -> list[str]:
    cell = section["confirmed"]
    if cell is None:
        return []
    said = (
        f"That cell with noise of fresh seeds on {many(cell['count'], 'test image')} held back, by neither of which "
        f"it was chosen: {_cell(cell)}."
    )
    if round(100 * max(c["gain"] for c in section["cells"]), 1) > 0:
        said += " The gain holds." if pays(cell) else " The gain does not hold there."
    return [said]


def _crossings(section: Mapping[str, Any]) -> list[str]:
    lines = []
    for found in section["crossings"]:
        sigma = f"{found['sigma']:g}"
        if found["pays"] is None:
            lines.append(f"Noise of sigma {sigma} pays at none of the sparsities tried.")
        elif found["below"] is None:
            lines.append(f"Noise of sigma {sigma} pays from the lowest sparsity tried, {level(found['pays'])}.")
        else:
            ends = f"{level(found['below'])} and {level(found['pays'])}"
            lines.append(f"Noise of sigma {sigma} begins to pay between sparsity {ends}.")
    return lines


def _transfers(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for way, words in _WORDS.items():
        known = [cell for cell in cells if way in cell["transfer"]]
        if known:
            kept = [cell["transfer"][way]["gain"] for cell in known]
            own = [cell["gain"] for cell in known]
            ahead = sum(k > o for k, o in zip(kept, own, strict=True))
            lines.append(
                f"A {words}: between {points(min(kept), signed=True)} and {points(max(kept), signed=True)} points "
                f"against the plain network; ahead of the noisy one in {ahead} of {many(len(known), 'cell')}."
            )
    return lines


def _gains(cells: Sequence[Mapping[str, Any]]) -> Table:
    sigmas = sorted({cell["sigma"] for cell in cells})
    by = {(cell["sigma"], cell["sparsity"]): cell for cell in cells}
    rows = []
    for sparsity in sorted({cell["sparsity"] for cell in cells}):
        row = [f"{points(by[s, sparsity]['gain'], signed=True)}{_mark(by[s, sparsity])}" for s in sigmas]
        rows.append((level(sparsity), percent(by[sigmas[0], sparsity]["plain"]), *row))
    head = ("Sparsity", "without noise", *(f"sigma {sigma:g}" for sigma in sigmas))
    return Table("Mean gain of noise, points (* pays, - harms: beyond chance)", head, tuple(rows))


def _mark(cell: Mapping[str, Any]) -> str:
    return " *" if pays(cell) else " -" if _harms(cell) else ""


def _accuracies(section: Mapping[str, Any]) -> Table:
    rows = [
        (
            f"{level(cell['sparsity'])}, sigma {cell['sigma']:g}",
            percent(cell["plain"]),
            f"{percent(cell['median'])}{_enclosed(cell)}",
            f"{points(min(cell['accuracies']))}..{points(max(cell['accuracies']))}",
            f"{points(cell['gain'], signed=True)} ({_ends(cell)})",
            _p(cell["p_gain_seeds"]),
            _p(cell["p_gain_images"]),
            _p(cell["p_gain"]),
        )
        for cell in [*section["cells"], *section["steps"]]
    ]
    head = (
        "Cell",
        "Without noise",
        "Median with noise",
        "All of them",
        "Gain, points",
        "p, seeds",
        "p, images",
        "p, Holm",
    )
    return Table("Every cell", head, tuple(rows))


def _exchanged(cells: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for cell in cells:
        row = [percent(cell["plain"]), percent(cell["median"])]
        for way in _WORDS:
            found = cell["transfer"][way]
            row.append(f"{percent(found['median'])}{_enclosed(found)}")
        rows.append((f"{level(cell['sparsity'])}, sigma {cell['sigma']:g}", *row))
    head = (
        "Cell",
        "Plain mask and weights",
        "Noisy mask and weights",
        "Noisy mask, plain weights",
        "Plain mask, noisy",
    )
    return Table("Masks exchanged, medians", head, tuple(rows))


def _picture(section: Mapping[str, Any], name: str) -> Picture:
    cells = section["cells"]
    sigmas = sorted({cell["sigma"] for cell in cells})

    def draw(axes: Axes) -> None:
        plain = section["plain"]
        axes.plot(
            [100 * p["sparsity"] for p in plain if p["sparsity"] >= cells[0]["sparsity"]],
            [100 * p["accuracy"] for p in plain if p["sparsity"] >= cells[0]["sparsity"]],
            color=INK,
            marker="s",
            linestyle=(0, (3.5, 2)),
            label="without noise",
        )
        for number, sigma in enumerate(sigmas):
            own = [cell for cell in cells if cell["sigma"] == sigma]
            known = [c for c in own if c["median_low"] is not None]
            color = COLORS[number % len(COLORS)][0]
            at = [100 * c["sparsity"] for c in own]
            axes.plot(
                at, [100 * c["median"] for c in own], color=color, marker=_MARKERS[number % 7], label=f"sigma {sigma:g}"
            )
            axes.vlines(
                [100 * c["sparsity"] for c in known],
                [100 * c["median_low"] for c in known],
                [100 * c["median_high"] for c in known],
                color=color,
                linewidth=1.2,
            )
        axes.set_xlabel("weights removed, %")
        axes.set_ylabel("top-1, %")

    caption = (
        f"Median of {many(len(cells[0]['accuracies']), 'network')} a point on {many(section['count'], 'image')}; bars "
        "are 95 % intervals of the median over noise seeds (order statistics)."
    )
    return draw_figure(f"{name}-accuracy", section["title"], draw, caption, f"Accuracy with noise: {section['title']}")


def _note(section: Mapping[str, Any]) -> str:
    tests = sorted({cell["test"] for cell in section["cells"] if not cell["test"].startswith("no test")})
    return (
        "Gain: mean accuracy over the noise seeds minus that of the network pruned without noise, with a 95 % interval "
        f"over images (paired, not corrected). p is one-sided: over seeds, {' or '.join(tests) or 'no test'} of the "
        "networks' accuracies against the constant without noise; over images, paired t. Holm: the larger of the two, "
        "corrected over the cells. Noise pays, or harms, where that is below .05, which holds for this one network: "
        "another training may differ. Steps between the sparsities asked for are not corrected for their number. Noise "
        f"and pruning act on {section['weights']:,} weights in {many(len(section['layers']), 'layer')}."
    )
