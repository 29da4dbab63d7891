"""Fine-tuning after pruning, with noise and without: before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from secateur.core.statistics import Interval, above, mean_interval
from secateur.lab.report.explore.view import View
from secateur.lab.report.picture import COLORS, INK, MUTED, Picture, draw_figure
from secateur.lab.report.tables import Table
from secateur.lab.report.words import amount, level, many, percent, points, sized, span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["view"]

# With fewer networks no rank test can reach 5 %.
_TESTED_FROM = 5
_LEVEL = 0.05


def view(section: Mapping[str, Any], name: str) -> View:
    """What fine-tuning gave back, and whether noise made a difference."""
    plain, *noisy = section["networks"]
    spec = section["spec"]
    lines = [_after(section, plain, noisy), *_tests(section, plain, noisy), _gains(section, plain, noisy)]
    if spec["paper"]:
        lines.append(_seen(section, plain, noisy))
    return View(
        title=section["title"],
        lines=tuple(lines),
        pictures=(_picture(section, name),),
        tables=(_table(section),),
        notes=(*_notes(section), *(_deviations(spec) if spec["paper"] else ())),
    )


def _values(networks: Sequence[Mapping[str, Any]], when: str) -> list[float]:
    return [float(network[when]) for network in networks]


def _after(section: Mapping[str, Any], plain: Mapping[str, Any], noisy: Sequence[Mapping[str, Any]]) -> str:
    values = _values(noisy, "after")
    start = f"At {level(section['spec']['sparsity'])} sparsity, fine-tuned, the network pruned without noise has "
    start += f"{percent(plain['after'])} on {amount(section['count'])} images held back"
    if len(values) == 1:
        return f"{start}, the one pruned with noise {percent(values[0])}."
    found = mean_interval(values, section["count"])
    ends = f"95 % interval {span(found)}, {found.method}; lowest {percent(min(values))}, highest {percent(max(values))}"
    return f"{start}; {many(len(values), 'network')} pruned with noise have {percent(found.mean)} on average ({ends})."


def _tests(section: Mapping[str, Any], plain: Mapping[str, Any], noisy: Sequence[Mapping[str, Any]]) -> list[str]:
    against = section["against"]
    found = Interval(against["mean"], against["low"], against["high"], len(noisy), against["method"], against["p"])
    images = f"over the images, 95 % interval {span(found)} ({found.method})"
    start = f"Fine-tuned, noisy minus plain is {points(found.mean, signed=True)} points"
    if section["judged"] or len(noisy) == 1:
        lines = [_chosen(section, noisy[0])] if section["judged"] else []
        return [*lines, f"{start}; {images}. That is said of these two networks: another draw of the noise may differ."]
    if len(noisy) < _TESTED_FROM:
        few = f"{many(len(noisy), 'noisy network')} are too few for a test over the noise, which takes {_TESTED_FROM}."
        return [f"{start}; {images}. {few}"]
    p, test = above(_values(noisy, "after"), plain["after"])
    below, _ = above([-value for value in _values(noisy, "after")], -plain["after"])
    verdict = "The noisy networks are not shown to be above the plain one."
    if min(p, below) < _LEVEL:
        ends = (found.low, found.high)
        clear = ends[0 if p < below else 1]
        verdict = f"The noisy networks are {'above' if p < below else 'below'} the plain one on these images, "
        sure = clear is not None and (clear > 0.0 if p < below else clear < 0.0)
        verdict += "by more than the choice of images explains." if sure else "but so few images may mislead."
    tested = f"over the noise, p = {p:.3f} ({test}, n = {len(noisy)})"
    return [f"{start}; {tested}; {images}. {verdict}"]


def _chosen(section: Mapping[str, Any], noisy: Mapping[str, Any]) -> str:
    tried, count = many(len(section["judged"]), "noisy network"), amount(section["judged_count"])
    best = percent(max(section["judged"]))
    return (
        f"Of {tried} only the best on the {count} images judged by was fine-tuned: seed {noisy['seed']}, {best} there "
        "before. The network without noise had one try."
    )


def _gains(section: Mapping[str, Any], plain: Mapping[str, Any], noisy: Sequence[Mapping[str, Any]]) -> str:
    average = " on average" if len(noisy) > 1 else ""
    before = sum(_values(noisy, "before")) / len(noisy)
    gained = sum(_values(noisy, "after")) / len(noisy) - before
    return (
        f"Before fine-tuning the network without noise had {percent(plain['before'])} and gained "
        f"{points(plain['after'] - plain['before'], signed=True)} points; with noise it was {percent(before)} and "
        f"{points(gained, signed=True)}{average}. The dense network has {percent(section['dense'])}."
    )


def _seen(section: Mapping[str, Any], plain: Mapping[str, Any], noisy: Sequence[Mapping[str, Any]]) -> str:
    parts = _values([plain, *noisy], "part")
    return (
        f"On the {amount(section['spec']['images'])} training images that the preset fine-tunes on, accuracy ends at "
        f"{percent(min(parts))} to {percent(max(parts))}. That is no measure of what the networks do on new images."
    )


def _notes(section: Mapping[str, Any]) -> list[str]:
    spec = section["spec"]
    notes = [
        f"Noise: sigma {spec['sigma']:g} on every weight that may be pruned, seeds 0 to {spec['variants'] - 1}; "
        f"criterion {spec['criterion']['name']}, scope {spec['scope']}. A network's mask is where it is not zero after "
        "pruning, and is held throughout. All networks see the same batches in the same order.",
        "Networks differ in their noise alone. Another dense network, another order of the batches or other test "
        "images may give another answer.",
    ]
    if not spec["paper"]:
        train, optimizer = spec["train"], spec["train"]["optimizer"]
        notes.append(
            f"Fine-tuning: the training set, {train['duration']}, {optimizer['name']}, learning rate "
            f"{optimizer['lr']:g} ({train['lr_schedule']['name']} over the whole training), weight decay "
            f"{optimizer['weight_decay']:g}, batches of {train['batch_size']}, augmentation {train['augment']}. "
            "Nothing was chosen by the images held back."
        )
    return notes


def _deviations(spec: Mapping[str, Any]) -> list[str]:
    images, epochs = spec["images"], spec["epochs"]
    return [
        f"Preset sp_paper_ft: as in the code released with stochastic pruning, only {amount(images)} images are "
        "trained on, a random part of the training set that the dense network has seen. That code draws it anew in "
        "every run; here it has a seed. The images are shuffled, cropped and mirrored.",
        f"The cosine is stepped with every batch instead of every epoch, with T_max = {epochs}: the rate goes from "
        f"1e-4 to 0 and back every {2 * epochs} steps. Weight decay is 5e-4 (the paper's text: 5e-5), momentum 0.9, "
        "batches of 128; every entry of the gradient is clipped to [-0.1, 0.1].",
        "BatchNorm stays in eval mode, its scale and shift are frozen, and so is every parameter outside the layers "
        "that are pruned. The state after the last step is measured.",
    ]


def _table(section: Mapping[str, Any]) -> Table:
    rows = [
        (
            "without noise" if network["seed"] is None else f"noise, seed {network['seed']}",
            percent(network["sparsity"], 2),
            percent(network["before"], 2),
            percent(network["after"], 2),
            points(network["after"] - network["before"], signed=True),
            amount(network["steps"]),
            sized(network["bytes"]),
        )
        for network in section["networks"]
    ]
    head = ("Network", "Removed", "Pruned", "Fine-tuned", "Points", "Steps", "File")
    return Table(f"Top-1 on {amount(section['count'])} images held back", head, tuple(rows))


def _picture(section: Mapping[str, Any], name: str) -> Picture:
    plain, *noisy = section["networks"]
    color = COLORS[0][0]

    def draw(axes: Axes) -> None:
        axes.axhline(100 * section["dense"], color=MUTED, linestyle=(0, (3.5, 2)), linewidth=1.2, label="dense network")
        for index, network in enumerate(noisy):
            # A little apart, else equal networks hide each other.
            shift = 0.0 if len(noisy) == 1 else 0.16 * (index / (len(noisy) - 1) - 0.5)
            ends = [100 * network["before"], 100 * network["after"]]
            axes.plot([shift, 1 + shift], ends, "-", color=color, linewidth=0.8, alpha=0.45)
            axes.plot([shift, 1 + shift], ends, "o", color=color, label=None if index else "with noise", alpha=0.85)
        ends = [100 * plain["before"], 100 * plain["after"]]
        axes.plot([-0.16, 1.16], ends, "s", color=INK, markersize=7, label="without noise")
        axes.plot([-0.16, 1.16], ends, "-", color=INK, linewidth=1.2)
        axes.set_xlim(-0.4, 1.4)
        axes.set_xticks([0, 1], ["pruned", "fine-tuned"])
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("top-1, %")

    count = amount(section["count"])
    caption = (
        f"Top-1 on {count} images held back, before and after fine-tuning at {level(section['spec']['sparsity'])} "
        "sparsity. One dot a network; dots of one group are set apart sideways to be seen. No intervals are drawn: the "
        "dots are the spread over noise seeds."
    )
    alt = (
        f"Without noise {percent(plain['before'])} becomes {percent(plain['after'])}; with noise "
        f"{_range(_values(noisy, 'before'))} becomes {_range(_values(noisy, 'after'))}."
    )
    return draw_figure(f"{name}-fine-tuning", "Before and after fine-tuning", draw, caption, alt)


def _range(values: Sequence[float]) -> str:
    low, high = percent(min(values)), percent(max(values))
    return low if low == high else f"{low} to {high}"
