"""What a race of unit masks shows: its winner on images that did not choose it, beside masks as they come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from secateur.lab.report.picture import COLORS, MUTED, Picture, draw_figure
from secateur.lab.report.tables import Table
from secateur.lab.report.words import amount, level, percent, points, sized

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["race_lines", "race_picture", "race_table"]


def race_lines(race: Mapping[str, Any]) -> list[str]:
    """Who won, how sure that is, and what became of it."""
    held, judged, delivered = race["held"], race["judged"], race["delivered"]
    ahead = held["ahead"]
    interval = "no interval" if ahead["low"] is None else f"{points(ahead['low'])} to {points(ahead['high'])}"
    known = ", one the network was trained with," if race["known"] else ""
    lines = [
        f"The best of {amount(race['candidates'])} masks at a drop rate of {level(race['rate'])} is mask "
        f"{race['seed']}{known} with {percent(held['winner'])} ({points(held['low'])}..{points(held['high'])}, Wilson) "
        f"on {amount(held['images'])} images it was not chosen by. That is {points(ahead['mean'], signed=True)} points "
        f"from the mean of {len(held['random_accuracies'])} random masks there ({interval}, {ahead['method']}).",
        f"On the {amount(judged['images'])} images it was chosen by it has {percent(judged['winner'])}, a number that "
        f"choosing flatters. From there to the others it changes by {_change(race, 'winner')} points, and random masks "
        f"change by {_change(race, 'random')} ({percent(judged['random'])} to {percent(held['random'])}).",
    ]
    if delivered is not None:
        lines.append(
            f"Cut along it, {percent(delivered['removed'])} of the parameters are gone; the file ({delivered['path']}, "
            f"{sized(delivered['bytes'])}), loaded again, has {percent(delivered['accuracy'])} on the same images."
        )
    return lines


def _change(race: Mapping[str, Any], what: str) -> str:
    return points(race["held"][what] - race["judged"][what], signed=True)


def race_picture(race: Mapping[str, Any], name: str) -> Picture:
    """The winner beside masks that were not chosen."""
    held, judged = race["held"], race["judged"]

    def draw(axes: Axes) -> None:
        axes.hist(
            [100 * a for a in held["random_accuracies"]],
            bins="auto",
            color=COLORS[1][0],
            alpha=0.5,
            label="random masks, held images",
        )
        axes.axvline(100 * held["winner"], color=COLORS[0][0], linewidth=2.2, label="the winner, held images")
        axes.axvline(100 * judged["winner"], color=MUTED, linestyle=":", label="the winner, images chosen by")
        axes.set_xlabel("top-1, %")
        axes.set_ylabel("masks")

    caption = (
        f"Accuracy of {len(held['random_accuracies'])} masks that were never raced and of the best of "
        f"{amount(race['candidates'])}, on images no choice was made by. Dotted: the winner where it was chosen."
    )
    alt = "Histogram of random masks' accuracy with the winner of the race"
    return draw_figure(name, f"best of {race['candidates']} masks", draw, caption, alt)


def race_table(race: Mapping[str, Any]) -> Table:
    """How many masks were left after how many images."""
    rows = [(amount(rung["images"]), amount(rung["alive"])) for rung in race["rungs"]]
    rows.append(("share of all evaluations", percent(race["evaluated"] / race["full"])))
    return Table("The race", ("Images seen", "Masks left"), tuple(rows))
