"""What pruning along unit masks shows: known and unseen masks by drop rate, the L2 control, and the race."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from secateur.lab.report.explore.mask_race import race_lines, race_picture, race_table
from secateur.lab.report.explore.view import View
from secateur.lab.report.picture import COLORS, INK, Picture, draw_figure
from secateur.lab.report.tables import Table
from secateur.lab.report.words import NOT_MEASURED, amount, level, many, percent, points, tiny

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["view"]

_NAMES = {"known": "masks it was trained with", "unseen": "masks it never saw"}
_SHIFT = {"known": -0.2, "unseen": 0.2}
_COLOR = {"known": COLORS[0][0], "unseen": COLORS[1][0]}


def view(section: Mapping[str, Any], name: str) -> View:
    """The section on the page, from its JSON alone."""
    rates = section["rates"]
    race = section.get("race")
    pictures = [_boxes(section, f"{name}-masks"), _sizes(section, f"{name}-sizes")]
    tables = [_accuracies(section), _cuts(rates)]
    lines = _lines(section)
    if race is not None:
        lines += race_lines(race)
        pictures.append(race_picture(race, f"{name}-race"))
        tables.append(race_table(race))
    return View(
        section["title"] or "Pruning along masks", tuple(lines), tuple(pictures), tuple(tables), _notes(section)
    )


def _kinds(section: Mapping[str, Any]) -> list[str]:
    return [kind for kind in _NAMES if section[kind]]


def _lines(section: Mapping[str, Any]) -> list[str]:
    rate = _shown(section)
    at, kinds, images = level(rate["rate"]), _kinds(section), section["images"]
    trained = section["trained"]
    said = ", the rate it was trained at," if trained and trained["drop_rate"] == rate["rate"] else ""
    found = [
        f"{_NAMES[kind]} keep a median of {percent(rate[kind]['median'])} ({_range(rate[kind])})" for kind in kinds
    ]
    lines = [
        f"At a drop rate of {at}{said} {' and '.join(found)}, on {amount(images)} images; the whole network has "
        f"{percent(section['dense'])}."
    ]
    against = rate["known_against_unseen"]
    if against is not None:
        p = against["p_adjusted"]
        sure = "the difference is resolved" if p < 0.05 else "the difference is not resolved"
        lines.append(
            f"Known less unseen masks: {points(against['medians'], signed=True)} points between the medians, "
            f"p = {tiny(p)} ({against['test']}; Holm over all rates): {sure}, for this one network."
        )
    lines.append(
        f"Removing as many units of each layer by their L2 norm instead: {'; '.join(_control(rate, k) for k in kinds)}."
    )
    lines.append(_cut_line(rate, kinds[0]))
    return lines


def _control(rate: Mapping[str, Any], kind: str) -> str:
    found = rate[kind]["against_control"]
    sure = "no interval"
    if found["low"] is not None:
        sure = f"{points(found['low'])} to {points(found['high'])}, {found['method']}, n={found['n']}"
    if found.get("p_adjusted") is not None:
        sure += f"; p = {tiny(found['p_adjusted'])}, Holm over all rates and kinds"
    return (
        f"{percent(rate[kind]['control']['median'])} at the counts of {_NAMES[kind]}, which are "
        f"{points(found['mean'], signed=True)} points from it on average ({sure})"
    )


def _cut_line(rate: Mapping[str, Any], kind: str) -> str:
    text = f"The cut removes a median of {percent(rate[kind]['median_removed'])} of all parameters there"
    proof = rate["proof"]
    if proof is None:
        return f"{text}; too little is left to compare the cut network with the one in training mode."
    return (
        f"{text}. The network cut along mask {proof['seed']} computes what it computes in training mode under that "
        f"mask: largest difference {tiny(proof['max_abs_diff'])} where outputs reach {tiny(proof['scale'])}, on "
        f"{many(proof['inputs'], 'image')}."
    )


def _shown(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The rate the lines speak of: the one trained at, or the nearest to it."""
    wanted = section["trained"]["drop_rate"] if section["trained"] else 0.5
    rates: Sequence[Mapping[str, Any]] = [r for r in section["rates"] if r["rate"]]
    return min(rates, key=lambda r: (abs(r["rate"] - wanted), r["rate"]))


def _range(part: Mapping[str, Any]) -> str:
    masks = many(len(part["accuracies"]), "mask")
    return f"{masks}, {percent(part['lowest'])} to {percent(part['highest'])}"


def _boxes(section: Mapping[str, Any], name: str) -> Picture:
    rates, kinds = section["rates"], _kinds(section)

    def draw(axes: Axes) -> None:
        for kind in kinds:
            color = _COLOR[kind]
            axes.boxplot(
                [[100 * a for a in rate[kind]["accuracies"]] for rate in rates],
                positions=[at + (_SHIFT[kind] if len(kinds) > 1 else 0.0) for at in range(len(rates))],
                widths=0.3,
                whis=(0, 100),
                manage_ticks=False,
                patch_artist=True,
                boxprops={"facecolor": color, "edgecolor": color, "alpha": 0.45},
                medianprops={"color": color, "linewidth": 2.0},
                whiskerprops={"color": color},
                capprops={"color": color},
            )
            axes.plot([], [], color=color, linewidth=6, alpha=0.6, label=_NAMES[kind])
        control = [100 * rate[kinds[0]]["control"]["median"] for rate in rates]
        axes.plot(range(len(rates)), control, color=INK, linestyle="--", marker="s", label="L2 norm, same counts")
        axes.set_xticks(range(len(rates)), [level(rate["rate"])[:-2] for rate in rates])
        axes.set_xlabel("drop rate, %")
        axes.set_ylabel("top-1, %")

    caption = (
        f"Each box holds one number a mask seed ({', '.join(f'{len(section[k])} {k}' for k in kinds)}): quartiles, "
        "median, and lowest to highest. Squares: median over the same counts of units (of the first kind of masks), "
        "those of lowest L2 norm removed and nothing rescaled."
    )
    return draw_figure(name, "accuracy by mask", draw, caption, "Accuracy of each mask by drop rate, as boxes")


def _sizes(section: Mapping[str, Any], name: str) -> Picture:
    rates, kinds = section["rates"], _kinds(section)

    def draw(axes: Axes) -> None:
        for kind, marker in zip(kinds, ("o", "^"), strict=False):
            removed = [100 * rate[kind]["median_removed"] for rate in rates]
            parts = [rate[kind] for rate in rates]
            axes.errorbar(
                removed,
                [100 * part["median"] for part in parts],
                yerr=[
                    [100 * (part["median"] - part["lowest"]) for part in parts],
                    [100 * (part["highest"] - part["median"]) for part in parts],
                ],
                color=_COLOR[kind],
                marker=marker,
                capsize=2.5,
                elinewidth=1.0,
                label=_NAMES[kind],
            )
        axes.plot(
            [100 * rate["l2"]["removed"] for rate in rates],
            [100 * rate["l2"]["accuracy"] for rate in rates],
            color=INK,
            linestyle="--",
            marker="s",
            label="L2 norm, expected counts",
        )
        axes.set_xlabel("parameters removed, %")
        axes.set_ylabel("top-1, %")

    caption = (
        "A point for each drop rate: median over masks of accuracy and of the share of parameters a cut removes; bars "
        "reach from the lowest to the highest mask. Squares: int(rate x units) of each layer removed by L2 norm."
    )
    alt = "Accuracy against the share of parameters removed, for masks and for the L2 norm"
    return draw_figure(name, "accuracy by size", draw, caption, alt)


def _accuracies(section: Mapping[str, Any]) -> Table:
    kinds = _kinds(section)
    head = ["Drop rate"]
    for kind in kinds:
        head += [f"{kind.capitalize()} masks, median (lowest..highest)", "L2, same counts, median"]
    head += ["L2, expected counts", *(["Known less unseen, medians (p, Holm)"] if len(kinds) > 1 else [])]
    rows = []
    for rate in section["rates"]:
        row = [level(rate["rate"])]
        for kind in kinds:
            part = rate[kind]
            row.append(f"{percent(part['median'])} ({points(part['lowest'])}..{points(part['highest'])})")
            row.append(percent(part["control"]["median"]))
        row.append(percent(rate["l2"]["accuracy"]))
        if len(kinds) > 1:
            found = rate["known_against_unseen"]
            row.append(
                "same network" if found is None else f"{points(found['medians'], True)} ({tiny(found['p_adjusted'])})"
            )
        rows.append(tuple(row))
    return Table("Top-1 by drop rate", tuple(head), tuple(rows))


def _cuts(rates: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for rate in rates:
        removed = [share for kind in _NAMES if rate[kind] for share in rate[kind]["removed"]]
        proof = rate["proof"]
        sizes = difference = NOT_MEASURED
        if proof is not None:
            sizes = f"{amount(proof['parameters_before'])} to {amount(proof['parameters_after'])}, mask {proof['seed']}"
            difference = f"{tiny(proof['max_abs_diff'])} of {tiny(proof['scale'])}"
        shares = f"{percent(min(removed))} to {percent(max(removed))}"
        rows.append((level(rate["rate"]), shares, percent(rate["l2"]["removed"]), sizes, difference))
    head = ("Drop rate", "Parameters removed, all masks", "By L2, expected counts", "One cut", "Training mode less cut")
    return Table("What the cuts remove", head, tuple(rows))


def _notes(section: Mapping[str, Any]) -> tuple[str, ...]:
    notes = [
        "One network: masks are the repetitions, and nothing here says what another training would give.",
        "Masks drop units with the drop rate as their chance, so counts differ from mask to mask; what is kept is "
        "multiplied by 1 / (1 - drop rate), behind a BatchNorm where one follows.",
    ]
    if not section["known"]:
        notes.append("The network was not trained under a mask pool, so there are no known masks.")
    layers = [layer["name"] for layer in section["layers"]]
    if section["trained"] and section["trained"]["layers"] != layers:
        other = sorted(set(section["trained"]["layers"]) ^ set(layers))
        notes.append(f"Training and this section do not mask the same layers; they differ in {', '.join(other)}.")
    if section["spec"].get("groups") == "inner":
        notes.append("Layers of residual sums are left whole.")
    elif section["coupled"]:
        first = section["coupled"][0]
        notes.append(
            f"Of {many(len(layers), 'layer')} {len(section['coupled'])} ({first} among them) make units "
            "together with others: such a unit is removed only if all of them drop it, and is else kept, as zeros."
        )
    if section["recalibrate"] is not None:
        notes.append(
            f"By drop rate, every variant has BatchNorm statistics of {section['recalibrate']} training images; the "
            "race and the cut keep the network's own."
        )
    return tuple(notes)
