"""What the section on single layers shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.lab.report.explore.charts import Series, chart, heat, sparsity_ticks, stretched
from secateur.lab.report.explore.view import View
from secateur.lab.report.tables import Table
from secateur.lab.report.words import amount, level, many, percent, points, tiny

__all__ = ["view"]

_SURE = 0.05
# More lines than these have no color of their own.
_NAMED = 5
_X = "removed, % (spaced by log of what is kept)"


def view(section: Mapping[str, Any], name: str) -> View:
    """The change of accuracy for each layer and sparsity: a table, cells, and lines."""
    layers, dense = section["layers"], section["dense"]
    sparsities = [step["sparsity"] for step in layers[0]["steps"]]
    return View(
        title=section["title"],
        lines=_lines(section, sparsities),
        pictures=(
            heat(
                f"{name}-heat",
                "Change in points, one layer pruned",
                [layer["layer"] for layer in layers],
                [level(sparsity) for sparsity in sparsities],
                [[-step["change"] for step in layer["steps"]] for layer in layers],
                [[points(step["change"], signed=True) for step in layer["steps"]] for layer in layers],
                "Change of accuracy in points, each layer pruned alone, against the whole network on the same images.",
            ),
            chart(
                f"{name}-lines",
                "Accuracy, one layer pruned",
                _series(layers),
                (_X, "top-1, %"),
                f"Dotted: the whole network, {percent(dense)}. The layers that lose most have a color; the table has "
                "the intervals.",
                ticks=sparsity_ticks(sparsities),
                level_at=100 * dense,
            ),
        ),
        tables=(_table(layers, sparsities),),
        notes=(
            f"Judged by {many(section['count'], 'image')}; weights ranked by {section['criterion']} within each layer.",
            f"Intervals: 95 %, each for itself ({', '.join(section['intervals'])}); p-values of the differences by "
            "the test named there, corrected over all comparisons of this section (Holm).",
        ),
    )


def _lines(section: Mapping[str, Any], sparsities: list[float]) -> tuple[str, ...]:
    layers = section["layers"]
    found = []
    for at in dict.fromkeys((0, len(sparsities) - 1)):
        if not sparsities[at]:
            continue
        worst = min(layers, key=lambda layer: layer["steps"][at]["change"])
        step = worst["steps"][at]
        hurt = sum(_hurts(layer["steps"][at]) for layer in layers)
        found.append(
            f"At {level(sparsities[at])}, {hurt} of {many(len(layers), 'layer')} lose accuracy beyond chance; "
            f'"{worst["layer"]}" changes most, by {points(step["change"], signed=True)} points '
            f"({_ends(step)}, p = {tiny(step.get('p_holm'))} after Holm)."
        )
    spared = [layer["layer"] for layer in layers if not any(map(_hurts, layer["steps"]))]
    if spared:
        found.append(f"No loss was found at any sparsity for {_some(spared)}.")
    reach = max((-s["low"] for la in layers for s in la["steps"] if not _hurts(s) and s["low"] is not None), default=0)
    if reach > 0:
        found.append(
            f"No loss found is not no loss: the intervals of those comparisons reach down to {points(-reach)} points."
        )
    found.append("Each layer was pruned alone; what several lose together is not the sum.")
    return tuple(found)


def _hurts(step: Mapping[str, Any]) -> bool:
    return step["change"] < 0 and step.get("p_holm", 1.0) < _SURE


def _series(layers: list[dict[str, Any]]) -> list[Series]:
    losses = {layer["layer"]: sum(step["accuracy"] for step in layer["steps"]) for layer in layers}
    named = sorted(losses, key=losses.__getitem__)[: _NAMED if len(layers) > _NAMED + 1 else len(layers)]
    lines = {}
    for layer in layers:
        xs = [stretched(step["sparsity"]) for step in layer["steps"]]
        ys = [100 * step["accuracy"] for step in layer["steps"]]
        chosen = layer["layer"] in named
        label = layer["layer"] if chosen else ""
        lines[layer["layer"]] = Series(label, xs, ys, role="one of many" if chosen else "faint")
    return [*(line for one, line in lines.items() if one not in named), *(lines[one] for one in named)]


def _table(layers: list[dict[str, Any]], sparsities: list[float]) -> Table:
    rows = [
        (
            layer["layer"],
            amount(layer["weights"]),
            *(f"{points(step['change'], signed=True)} ({_ends(step)})" for step in layer["steps"]),
        )
        for layer in layers
    ]
    head = ("Layer", "Weights", *(level(sparsity) for sparsity in sparsities))
    return Table("Change of top-1 in points, one layer pruned alone", head, tuple(rows))


def _ends(step: Mapping[str, Any]) -> str:
    return "no interval" if step["low"] is None else f"{points(step['low'])}..{points(step['high'])}"


def _some(names: list[str]) -> str:
    shown = ", ".join(f'"{one}"' for one in names[:4])
    return shown if len(names) <= 4 else f"{shown} and {many(len(names) - 4, 'other')}"
