"""The verdict in words, every one of them computed from the rows.

Each method is compared, seed by seed, with the control that had no regularizer and was pruned by its score
alone. Looking at many sparsities and quoting the best one is picking; so every sentence that picks says from
how many, and is called resolved only after Holm's correction over those it was picked from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from secateur.core.statistics import Interval, holm, mean_interval, paired_difference
from secateur.lab.report.panels import Arm, Panel
from secateur.lab.report.schema import Result
from secateur.lab.report.words import level, many, percent, points, span

__all__ = ["ALPHA", "MARGIN", "Comparison", "Section", "Verdict", "compare", "judge"]

ALPHA = 0.05
MARGIN = 0.01  # "within one point of dense"
_INTERVAL = "95 % interval"
_MANY = 6  # arms of a panel that need an overview


@dataclass(frozen=True)
class Comparison:
    """One method against the control at one sparsity.

    Args:
        panel, arm, baseline, sparsity: what is compared with what, where.
        interval: of arm minus baseline, over paired seeds, not corrected.
        own: p-value after Holm over this arm's sparsities; 1 where there is no interval.
        all: p-value after Holm over every comparison of the report.
        sparsities, family: the sizes of those two families.
    """

    panel: Panel
    arm: Arm
    baseline: Arm
    sparsity: float
    interval: Interval
    own: float = 1.0
    all: float = 1.0
    sparsities: int = 1
    family: int = 1

    @property
    def name(self) -> str:
        """The method, with its criterion where the control was pruned by another."""
        if self.panel.retrained:
            return self.arm.label
        if self.arm.method == self.baseline.method:
            return f"{self.arm.criterion} alone"
        other = self.arm.criterion != self.baseline.criterion and self.arm.criterion not in self.arm.label
        return self.arm.label + (f" ({self.arm.criterion})" if other else "")

    @property
    def against(self) -> str:
        """The control: its score alone, or its name where all were trained again."""
        return self.baseline.label if self.panel.retrained else f"{self.baseline.criterion} alone"

    @property
    def resolved(self) -> bool:
        """Zero is excluded, also after Holm over this arm's sparsities."""
        return self.interval.resolved and self.own < ALPHA

    @property
    def word(self) -> str:
        """One word or two for a table."""
        if not self.resolved:
            return "not resolved"
        return "more" if self.interval.mean > 0 else "less"

    def sentence(self, settled: bool | None = None) -> str:
        """What can be said about this comparison; `settled` overrides which correction decides."""
        at = f"at {level(self.sparsity)}"
        if self.resolved if settled is None else settled:
            better = self.interval.mean > 0
            shown = self.interval if better else self.interval.negated()
            how = "more" if better else "less"
            return (
                f"{self.name} keeps {points(shown.mean)} points {how} than {self.against} {at} "
                f"({_INTERVAL} {span(shown)}, {many(self.interval.n, 'paired seed')})"
            )
        found = f"{self.name} minus {self.against} {at} is {points(self.interval.mean, signed=True)} points"
        return f"not resolved with {many(self.interval.n, 'seed')}: {found} ({_uncertainty(self.interval)})"


@dataclass(frozen=True)
class Section:
    """A title and its sentences; `brief` sections are those a terminal prints too."""

    title: str
    lines: tuple[str, ...]
    brief: bool = False


@dataclass(frozen=True)
class Verdict:
    """All that the report says in words about one run."""

    headline: str
    detail: str
    sections: tuple[Section, ...]
    comparisons: tuple[Comparison, ...]


def judge(result: Result) -> Verdict:
    """The verdict on one run: headline, how it was picked, sentences by granularity, and every comparison."""
    comparisons = compare(result)
    headline, detail = _headline(result, comparisons)
    sections = [_before(result)]
    for panel in result.panels:
        lines = [_picked([c for c in comparisons if c.panel is panel and c.arm is arm]) for arm in panel.arms]
        lines.insert(0, _overview([c for c in comparisons if c.panel is panel]))
        sections.append(Section(_capital(panel.title), tuple(filter(None, lines)), brief=True))
    for panel in result.panels:
        lines = [_reach(result, arm) for arm in panel.arms]
        sections.append(Section(f"Within 1 point of dense, {panel.title}", tuple(filter(None, lines))))
    return Verdict(headline, detail, tuple(item for item in sections if item.lines), tuple(comparisons))


def compare(result: Result) -> list[Comparison]:
    """Every method against the control, at every sparsity above zero that both were pruned to."""
    found: list[Comparison] = []
    for panel in result.panels:
        for arm in panel.arms:
            baseline = _baseline(result, panel, arm)
            if baseline is None:
                continue
            own: list[Comparison] = []
            for sparsity in panel.sparsities:
                ours, theirs = arm.top1(sparsity), baseline.top1(sparsity)
                if sparsity > 0 and ours.keys() & theirs.keys():
                    counts = (arm.count(sparsity), baseline.count(sparsity))
                    interval = paired_difference(ours, theirs, count=_smaller(*counts))
                    own.append(Comparison(panel, arm, baseline, sparsity, interval))
            found += [
                replace(item, own=p, sparsities=len(own))
                for item, p in zip(own, holm([_p(item) for item in own]), strict=True)
            ]
    adjusted = holm([_p(item) for item in found])
    return [replace(item, all=p, family=len(found)) for item, p in zip(found, adjusted, strict=True)]


def _p(item: Comparison) -> float:
    return 1.0 if item.interval.p is None else item.interval.p


def _smaller(*counts: int | None) -> int | None:
    known = [count for count in counts if count is not None]
    return min(known) if len(known) == len(counts) else None


def _baseline(result: Result, panel: Panel, arm: Arm) -> Arm | None:
    """The control's arm closest to `arm`: the one the recipe calls its control, same criterion, else magnitude."""
    if result.baseline is None:
        return None
    present = [other.method for other in panel.arms]
    # Networks that were trained again are compared among themselves, so there the first of them is the control.
    method = result.baseline.label if result.baseline.label in present else present[0]
    arms = [other for other in panel.arms if other.method == method]

    def distance(other: Arm) -> tuple[bool, bool, bool, bool]:
        same = other.criterion == arm.criterion and other.method != arm.method
        return (not same, not other.control, other.criterion != "magnitude", other.scope != arm.scope)

    best = min(arms, key=distance, default=None)
    return None if best is arm else best


def _headline(result: Result, comparisons: Sequence[Comparison]) -> tuple[str, str]:
    if result.baseline is None:
        return (
            "No verdict: no method of this run was trained without a regularizer.",
            "Without that control nothing says what pruning by the score alone would have kept.",
        )
    if not comparisons:
        return (
            f"No verdict: nothing to compare with {result.baseline.label}.",
            "No other method was pruned to the same sparsity with the same seeds.",
        )
    family = comparisons[0].family
    of = f"largest of {many(family, 'comparison')} (methods, sparsities, granularities)"
    settled = [item for item in comparisons if item.interval.resolved and item.all < ALPHA]
    gains = [item for item in settled if item.interval.mean > 0]
    losses = [item for item in settled if item.interval.mean < 0]
    best = max(gains, key=lambda item: item.interval.mean, default=None)
    worst = min(losses, key=lambda item: item.interval.mean, default=None)
    if best is not None:
        detail = f"Picked as the {of}; Holm-corrected over all of them, {_p_text(best.all)}."
        if worst is not None:
            detail += f" The largest loss: {_where(worst)}, {_p_text(worst.all)}."
        return f"{_where(best)}.", detail
    if worst is not None:
        return (
            f"No method is shown to keep more than {worst.against}; {_where(worst)}.",
            f"Picked as the {of}; Holm-corrected over all of them, {_p_text(worst.all)}.",
        )
    top = max(comparisons, key=lambda item: abs(item.interval.mean))
    detail = f"Picked as the {of}; Holm-corrected over all of them, {_p_text(top.all)}."
    if top.interval.resolved:
        detail += " The interval is before correction."
    own = [item for item in comparisons if item.resolved]
    if own:
        would = f"{many(len(own), 'comparison')} would be resolved"
        detail += f" Corrected over one method's own sparsities only, {would}."
    return f"{_capital(_where(top, settled=False))}.", detail


def _where(item: Comparison, settled: bool = True) -> str:
    return f"{item.sentence(settled)}, {item.panel.title}"


def _picked(own: Sequence[Comparison]) -> str:
    """The sentence about one arm: its largest gap, and from how many sparsities that was picked."""
    if not own:
        return ""
    resolved = [item for item in own if item.resolved]
    top = max(resolved or own, key=lambda item: abs(item.interval.mean))
    of = f"largest of {many(top.sparsities, 'sparsity', 'sparsities')}"
    said = top.sentence() if top.resolved else f"{top.name}: {top.sentence()}"
    sentence = f"{said}; {of}, Holm-corrected over them, {_p_text(top.own)}"
    if top.interval.n == 1:
        return f"{said}; {of}."
    if resolved:
        return f"{sentence}; resolved at {len(resolved)} of {top.sparsities}."
    return sentence + (" (the interval is before correction)." if top.interval.resolved else ".")


def _overview(own: Sequence[Comparison]) -> str:
    """Which of many arms are above the control and which are not, before each has its sentence."""
    names = list(dict.fromkeys(item.name for item in own))
    if len(names) <= _MANY:
        return ""
    signs = {name: {item.interval.mean > 0 for item in own if item.name == name and item.resolved} for name in names}
    groups = {
        "More than the control at some sparsity": [n for n in names if signs[n] == {True}],
        "less": [n for n in names if signs[n] == {False}],
        "both": [n for n in names if len(signs[n]) == 2],
        "not resolved": [n for n in names if not signs[n]],
    }
    return "; ".join(f"{word}: {', '.join(found)}" for word, found in groups.items() if found) + "."


def _before(result: Result) -> Section:
    """What each method costs before anything is pruned."""
    lines = []
    base = None if result.baseline is None else result.baseline.label
    dense = {} if base is None else result.unpruned(base)
    count = _test_count(result)
    if dense:
        mean = mean_interval(list(dense.values()), count)
        ends = "" if mean.low is None or mean.high is None else f", {_INTERVAL} {span(mean)}"
        lines.append(
            f"{base} (the control) reaches {percent(mean.mean)} before pruning ({many(mean.n, 'seed')}{ends})."
        )
    for method in result.methods:
        ours = result.unpruned(method.label)
        if method.label == base or not ours.keys() & dense.keys():
            continue
        got = paired_difference(ours, dense, count=count)
        if got.resolved:
            better = got.mean > 0
            shown = got if better else got.negated()
            lines.append(
                f"{method.label} {'gains' if better else 'costs'} {points(shown.mean)} points before pruning "
                f"({_INTERVAL} {span(shown)}, {many(got.n, 'paired seed')})."
            )
        else:
            lines.append(
                f"{method.label}: a cost or gain before pruning is not resolved with {many(got.n, 'seed')}: "
                f"{points(got.mean, signed=True)} points ({_uncertainty(got)})."
            )
    return Section("Before pruning", tuple(lines))


def _reach(result: Result, arm: Arm) -> str:
    """The highest sparsity at which the arm is within one point of the dense control."""
    base = arm.method if result.baseline is None else result.baseline.label
    reference = "its unpruned self" if base == arm.method else f"unpruned {base}"
    dense = result.unpruned(base)
    tried = [sparsity for sparsity in sorted(arm.points) if sparsity > 0 and arm.top1(sparsity).keys() & dense.keys()]
    if not tried:
        return ""
    found = {s: paired_difference(arm.top1(s), dense, count=arm.count(s)) for s in tried}
    within = [s for s in tried if found[s].mean >= -MARGIN]
    if not within:
        return f"{arm.label} is more than 1 point below {reference} at every sparsity tried, from {level(tried[0])} on."
    sparsity, got = within[-1], found[within[-1]]
    # Training under a targeted regularizer can leave a network that is best when pruned as it was trained to be.
    gaps = [s for s in tried if s < sparsity and s not in within]
    reach = (
        "stays within 1 point of {} up to {}" if not gaps else "is within 1 point of {} at {}, not at every lower one"
    )
    if got.low is None:
        sure = "not resolved: " + _uncertainty(got)
    else:
        sure = f"{_INTERVAL} {span(got)}" + ("" if got.low >= -MARGIN else ", so not certain")
    where = reach.format(reference, level(sparsity))
    return f"{arm.label} {where}: {points(got.mean, signed=True)} points there ({sure})."


def _test_count(result: Result) -> int | None:
    counts = [row.count for row in result.rows]
    return _smaller(*counts)


def _uncertainty(interval: Interval) -> str:
    if interval.low is not None:
        return f"{_INTERVAL} {span(interval)}"
    if interval.n == 1:
        return "an interval needs at least 2 seeds"
    return "equal on every seed and the test-set size is unknown, so no interval"


def _p_text(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
