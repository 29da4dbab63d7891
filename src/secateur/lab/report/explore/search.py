"""What a search found: the front, how it grew, and the network delivered from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from secateur.lab.report.explore.delivered import delivered_lines, delivered_table
from secateur.lab.report.explore.view import View
from secateur.lab.report.picture import COLORS, INK, MUTED, Picture, draw_figure
from secateur.lab.report.tables import Table
from secateur.lab.report.words import many, percent, points, sized

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["view"]

_AXES = {
    "sparsity": ("sparsity, %", 100.0),
    "gain": ("gain of noise x sparsity, points", 100.0),
    "latency": ("time of the dense network's, %", 100.0),
    "bytes": ("tensors as stored, KiB", 1 / 1024),
}
# More numbers than this make a table nobody reads; the recipes of the points have them.
_NUMBERS = 4


def view(section: Mapping[str, Any], name: str) -> View:
    """What a search section found."""
    pictures = [_scatter(section, name, other) for other in section["objectives"] if other != "accuracy"]
    if section["hypervolume"] is not None:
        pictures.append(_growth(section, name))
    return View(
        title=section["title"],
        lines=(*_lines(section), *delivered_lines(section["delivered"], section["stage"]), *_loss(section)),
        pictures=tuple(pictures),
        tables=(_front(section), delivered_table(section["delivered"])),
        notes=(_note(section),),
    )


def _lines(section: Mapping[str, Any]) -> list[str]:
    trials, front = section["trials"], section["front"]
    failed = [trial for trial in trials if trial["values"] is None]
    spec = section["spec"]
    lines = [
        f"{many(len(trials), 'trial')} by {spec['sampler']}, {len(front)} of them on the front of "
        f"{', '.join(section['objectives'][:-1])} and {section['objectives'][-1]}; the dense network has "
        f"{percent(section['dense'])} on the images judged by."
    ]
    if notes := section.get("notes"):
        lines.append(f"Left out, {many(len(notes), 'group')} that cannot be cut alone: {'; '.join(notes[:2])}.")
    if failed:
        lines.append(f"{many(len(failed), 'trial')} failed; the first: {failed[0]['reason']}.")
    if spec["sampler"] == "nsga2" and len(trials) <= spec["population"]:
        lines.append(f"All of them were drawn at random: a generation has {spec['population']}, and the first one is.")
    if "gain" in section["objectives"]:
        lines.append(_gain(section))
    series = [] if section["hypervolume"] is None else section["hypervolume"]["series"]
    if len(series) > 1 and series[-1] > 0:
        half = series[len(series) // 2 - 1] / series[-1]
        lines.append(f"The first half of the trials had found {percent(half)} of the final hypervolume.")
    lines.append(f"Chosen: {section['why']}.")
    return lines


def _loss(section: Mapping[str, Any]) -> list[str]:
    """What to say where the network delivered loses more than it was chosen for."""
    lost, allowed = -section["delivered"]["difference"]["mean"], section["spec"]["tolerance"]
    if lost <= allowed or not section["why"].startswith("the best "):
        return []
    return [
        f"That is more than the {points(allowed)} points allowed: on the images it was chosen by it looked better. "
        "More of them (judge.images) choose more surely."
    ]


def _gain(section: Mapping[str, Any]) -> str:
    best = max((t for t in section["trials"] if t["values"] is not None), key=lambda t: t["values"]["gain"])
    numbers, extras = best["numbers"], best["extras"]
    return (
        f"Largest gain of noise: sigma {numbers['sigma']:.4g} at sparsity {percent(numbers['sparsity'])}, "
        f"{percent(best['values']['accuracy'])} on average with noise and {percent(extras['plain'])} without "
        f"({points(best['values']['accuracy'] - extras['plain'], signed=True)} points). It is the best of "
        f"{many(len(section['trials']), 'trial')} on the images that it was chosen by, so expect less elsewhere."
    )


def _front(section: Mapping[str, Any]) -> Table:
    others = [name for name in section["objectives"] if name != "accuracy"]
    names = [name for name in section["names"] if name not in others] if len(section["names"]) <= _NUMBERS else []
    rows = []
    for point in section["front"]:
        values = [_value(name, point["values"][name]) for name in others]
        numbers = [f"{point['numbers'][name]:.4g}" for name in names]
        if "latency_again" in point:
            values.append(percent(point["latency_again"]))
        accuracy, held = percent(point["values"]["accuracy"]), percent(point["held_accuracy"])
        rows.append((f"trial {point['trial']}", *numbers, *values, accuracy, held, point["recipe"]))
    again = ["latency, timed again"] if any("latency_again" in point for point in section["front"]) else []
    head = ("Point", *names, *others, *again, "Accuracy, judged by", "Held back", "Recipe")
    return Table("The front", head, tuple(rows))


def _value(name: str, value: float) -> str:
    if name == "bytes":
        return sized(value)
    return points(value, signed=True) if name == "gain" else percent(value)


def _scatter(section: Mapping[str, Any], name: str, other: str) -> Picture:
    words, factor = _AXES[other]
    trials = [trial for trial in section["trials"] if trial["values"] is not None]
    front: Sequence[Mapping[str, Any]] = sorted(section["front"], key=lambda point: point["values"][other])

    def draw(axes: Axes) -> None:
        axes.scatter(
            [factor * t["values"][other] for t in trials],
            [100 * t["values"]["accuracy"] for t in trials],
            s=14,
            color=MUTED,
            alpha=0.5,
            linewidths=0,
            label="trials",
        )
        at = [factor * p["values"][other] for p in front]
        axes.plot(at, [100 * p["values"]["accuracy"] for p in front], color=COLORS[0][0], marker="o", label="front")
        held = [100 * p["held_accuracy"] for p in front]
        axes.plot(at, held, color=COLORS[1][0], marker="^", linestyle="none", label="front, held back")
        chosen = section["front"][section["chosen"]]
        axes.plot(
            [factor * chosen["values"][other]],
            [100 * chosen["values"]["accuracy"]],
            marker="o",
            markersize=12,
            markerfacecolor="none",
            color=INK,
            linestyle="none",
            label="delivered",
        )
        axes.axhline(100 * section["dense"], color=INK, linewidth=1, linestyle=(0, (3.5, 2)))
        axes.set_xlabel(words)
        axes.set_ylabel("top-1, %")

    caption = (
        f"Every trial on {many(section['judged'], 'image')}; the front again on "
        f"{many(section['held'], 'test image')} by which nothing was chosen. Dashed: the dense network."
    )
    return draw_figure(f"{name}-{other}", section["title"], draw, caption, f"Accuracy against {other} of all trials")


def _growth(section: Mapping[str, Any], name: str) -> Picture:
    series = section["hypervolume"]["series"]

    def draw(axes: Axes) -> None:
        axes.plot(range(1, len(series) + 1), series, color=COLORS[0][0])
        axes.set_xlabel("trials that did not fail")
        axes.set_ylabel("hypervolume")
        axes.set_ylim(bottom=0)

    reference = ", ".join(
        f"{n} {v:g}" for n, v in zip(section["objectives"], section["hypervolume"]["reference"], strict=True)
    )
    caption = f"What the front covers after each trial, up to the reference point ({reference})."
    return draw_figure(f"{name}-hypervolume", "Growth of the front", draw, caption, "Hypervolume over trials")


def _note(section: Mapping[str, Any]) -> str:
    spec = section["spec"]
    networks, held = "that of the cut network", "the same network"
    if spec["vary"] == "weights":
        networks = f"the mean of {many(spec['variants'], 'network')} with noise of their own"
        held = "the best of them by the images judged by" if spec["variants"] > 1 else held
    return (
        f"Accuracy: {networks}; held back: {held}. Proposed by Optuna {section['optuna']}. The best of many trials is "
        "flattered by having been chosen: believe the images held back. The file delivered, and a recipe "
        f"that makes each point again (secateur run FILE), are in the folder stages/explore-{section['stage']}."
    )
