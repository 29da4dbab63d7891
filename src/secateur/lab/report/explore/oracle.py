"""What the section on the greedy oracle shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.lab.report.explore.charts import Series, chart
from secateur.lab.report.explore.view import View
from secateur.lab.report.tables import Table
from secateur.lab.report.words import amount, many, percent, points, tiny

__all__ = ["view"]

_SURE = 0.05
# The whole order may be hundreds of units; what went first says most.
_SHOWN = 50


def view(section: Mapping[str, Any], name: str) -> View:
    """Accuracy and loss against the number of units dropped, along each order."""
    dropped, curves = section["dropped"], section["curves"]
    units = sum(section["layers"].values())

    def series(key: str, scale: float, bars: bool) -> list[Series]:
        return [
            Series(
                _label(curve),
                dropped,
                [scale * value for value in curve[key]],
                [scale * end for end in curve["low"]] if bars else (),
                [scale * end for end in curve["high"]] if bars else (),
                role="control" if curve["label"] == "random" else "one of many",
            )
            for curve in curves
        ]

    x = f"units dropped, of {units}"
    return View(
        title=section["title"],
        lines=_lines(section, units),
        pictures=(
            chart(
                f"{name}-accuracy",
                "Accuracy as units are dropped",
                series("accuracy", 100.0, True),
                (x, "top-1, %"),
                "Nothing is trained again. Bars: 95 % Wilson intervals over images; for several random orders the "
                "mean, from the lowest to the highest of them.",
            ),
            chart(
                f"{name}-loss",
                "Loss on the images searched",
                series("loss", 1.0, False),
                (x, "cross-entropy, nats"),
                f"Over the {many(section['searched'], 'training image')} that the search looked at. It takes the "
                "best next step, which need not lead to the best order.",
            ),
        ),
        tables=(_table(section), _order(section)),
        notes=(
            f"Accuracy: {many(section['count'], 'image')}, none of which any order was made by. The search tried "
            f"{amount(section['tried'])} removals, each a pass over {many(section['searched'], 'training image')}.",
            "Criteria rank all units once, on the whole network, over all layers together; equal ranks go by layer "
            f"and index. Every layer keeps {many(section['spec']['min_keep'], 'unit')} or more.",
            "Differences are paired by image. For one order: Agresti-Min, exact sign test; against the mean of several "
            "random orders: Student's t over images, these orders taken as given. p-values are corrected over all of "
            "them (Holm).",
        ),
    )


def _lines(section: Mapping[str, Any], units: int) -> tuple[str, ...]:
    dropped, (oracle, *others) = section["dropped"], section["curves"]
    at = len(dropped) // 2
    found = [
        f"With {dropped[at]} of {many(units, 'unit')} dropped, halfway, the greedy oracle is right in "
        f"{percent(oracle['accuracy'][at])} of images (whole network: {percent(oracle['accuracy'][0])})."
    ]
    for curve in others:
        item = curve["behind"][at]
        found.append(
            f"{_label(curve)}: {percent(curve['accuracy'][at])} there; the oracle minus it is "
            f"{points(item['mean'], signed=True)} points ({_ends(item)}, p = {tiny(item.get('p_holm'))} after Holm). "
            f"{_tally(curve['behind'])}"
        )
    found.append("The search saw labels and tried every removal; it is a yardstick, not a method for large networks.")
    found.append("Nothing was trained again: what training repairs may rank units in another way.")
    return tuple(found)


def _tally(items: list[dict[str, Any]]) -> str:
    sure = [item for item in items if item.get("p_holm", 1.0) < _SURE]
    ahead = sum(item["mean"] > 0 for item in sure)
    return (
        f"Of {many(len(items) - 1, 'number')} of dropped units the oracle is ahead beyond chance at {ahead}, behind at "
        f"{len(sure) - ahead}."
    )


def _table(section: Mapping[str, Any]) -> Table:
    oracle, *others = section["curves"]
    rows = []
    for at, count in enumerate(section["dropped"]):
        cells = [f"{percent(oracle['accuracy'][at])} (loss {oracle['loss'][at]:.3f})"]
        for curve in others:
            item = curve["behind"][at]
            cells.append(
                f"{percent(curve['accuracy'][at])} (loss {curve['loss'][at]:.3f}); "
                f"{points(item['mean'], signed=True)} ({_ends(item)})"
            )
        rows.append((str(count), *cells))
    head = ("Units dropped", "greedy oracle", *(f"{_label(c)}; oracle minus it, points" for c in others))
    return Table("Top-1, and loss on the images searched", head, tuple(rows))


def _order(section: Mapping[str, Any]) -> Table:
    steps = section["order"][:_SHOWN]
    rows = tuple(
        (str(number), step["layer"], str(step["unit"]), f"{step['loss']:.4f}") for number, step in enumerate(steps, 1)
    )
    left = len(section["order"]) - len(steps)
    title = "Order of removal" + (f", the first {len(steps)} of {len(section['order'])}" if left else "")
    return Table(title, ("Step", "Layer", "Unit", "Loss without it"), rows)


def _label(curve: Mapping[str, Any]) -> str:
    return curve["label"] if curve["orders"] == 1 else f"{curve['label']} (mean of {curve['orders']})"


def _ends(item: Mapping[str, Any]) -> str:
    return "no interval" if item["low"] is None else f"{points(item['low'])}..{points(item['high'])}"
