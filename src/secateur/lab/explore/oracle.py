"""The greedy oracle beside what criteria and chance would drop, on the same network, without training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.core.granularity import Unit
from secateur.core.seeds import keyed_numpy
from secateur.core.statistics import holm, paired_examples, wilson
from secateur.core.targets import Targets, find_targets
from secateur.criteria.driver import cell_scores, score_targets
from secateur.lab.explore.oracle_spec import OracleSpec
from secateur.lab.explore.session import Session
from secateur.lab.plugins import make_criterion
from secateur.variants.evaluate import Score, evaluate_variants, right_or_wrong
from secateur.variants.greedy import GreedyOracle, greedy_oracle, negative_cross_entropy
from secateur.variants.kinds import DropUnits
from secateur.variants.outcome import Outcome
from secateur.variants.workbench import Workbench

__all__ = ["run"]

Order = Sequence[tuple[str, int]]


def run(session: Session, spec: OracleSpec, folder: Path) -> dict[str, Any]:
    """The order the search finds, and accuracy and loss along it and along all other orders."""
    targets = find_targets(session.network, session.recipe.include, (*session.recipe.excluded, *spec.exclude))
    bench = Workbench(session.network, targets, batches=session.scored)
    searched = session.training_images(spec.images)
    found = _search(session, spec, bench, searched, folder)
    steps = len(found.steps)
    orders: dict[str, list[Order]] = {"greedy oracle": [found.order]}
    for plugin in spec.criteria:
        orders[_label(plugin, spec)] = [_ranked(session, targets, plugin, spec.min_keep)[:steps]]
    if spec.random:
        orders["random"] = [_random(targets, spec, number)[:steps] for number in range(spec.random)]
    counts = sorted({round(steps * at / (spec.points - 1)) for at in range(spec.points)})
    variants = {
        label: [[DropUnits(tuple(o[:n])) for n in counts] for o in several] for label, several in orders.items()
    }
    wanted = list(dict.fromkeys(v for several in variants.values() for row in several for v in row))
    right = _evaluate(session, bench, wanted, session.judged, right_or_wrong, folder / "right.jsonl")
    losses = _evaluate(session, bench, wanted, searched, negative_cross_entropy, folder / "loss.jsonl")
    curves = [_curve(label, several, right, losses) for label, several in variants.items()]
    _compare(curves, variants, right)
    return {
        "count": session.counts[0],
        "searched": sum(len(labels) for _, labels in searched),
        "layers": {target.module: target.units for target in targets},
        "order": [{"layer": bench.target(s.layer).module, "unit": s.unit, "loss": -s.score} for s in found.steps],
        "whole_loss": -found.whole,
        "dropped": counts,
        "curves": curves,
        # A removal tried is a pass over the images searched; what a journal held was tried in an earlier run.
        "tried": sum(_left(found, step, spec.min_keep) for step in range(steps)),
    }


def _search(session: Session, spec: OracleSpec, bench: Workbench, batches: Any, folder: Path) -> GreedyOracle:
    def progress(tried: int, of: int) -> None:
        session.listener.advanced(tried, f"{tried} of {of} removals tried")
        session.listener.check_stop()

    until = 0.1 if spec.steps is None and spec.until is None else spec.until
    most = sum(max(0, target.units - spec.min_keep) for target in bench.targets)
    return greedy_oracle(
        bench,
        batches,
        steps=None if spec.steps is None else min(spec.steps, most),
        until=until,
        min_keep=spec.min_keep,
        recalibrate=session.renewing,
        journal=folder / "search.jsonl",
        progress=progress,
    )


def _evaluate(
    session: Session, bench: Workbench, variants: list[DropUnits], batches: Any, score: Score, journal: Path
) -> Outcome:
    def progress(done: int, of: int) -> None:
        session.listener.advanced(done, f"{done} of {of} evaluations")
        session.listener.check_stop()

    return evaluate_variants(
        bench, variants, batches, score=score, recalibrate=session.renewing, journal=journal, progress=progress
    )


def _ranked(session: Session, targets: Targets, plugin: dict[str, Any], min_keep: int) -> list[tuple[str, int]]:
    """All units that may go, lowest score first; equal scores: the earlier layer, the lower index."""
    criterion = make_criterion(plugin, session.context.options.allow_code)
    (scores,) = score_targets(session.network, targets, [criterion], batches=session.scored)
    cells = cell_scores(criterion, Unit(), targets, scores)
    values = {n: (c.abs() if criterion.absolute else c).detach().double().cpu().numpy() for n, c in cells.items()}
    flat = [(float(value), n, u) for n in values for u, value in enumerate(values[n])]
    return _sparing([(name, unit) for _, name, unit in sorted(flat, key=lambda item: item[0])], targets, min_keep)


def _random(targets: Targets, spec: OracleSpec, number: int) -> list[tuple[str, int]]:
    units = [(target.name, unit) for target in targets for unit in range(target.units)]
    drawn = keyed_numpy(spec.seed, "oracle", "random order", number).permutation(len(units))
    return _sparing([units[at] for at in drawn], targets, spec.min_keep)


def _sparing(order: Order, targets: Targets, min_keep: int) -> list[tuple[str, int]]:
    """The order without those that would leave a layer too little."""
    left = {target.name: target.units for target in targets}
    found = []
    for name, unit in order:
        if left[name] > min_keep:
            left[name] -= 1
            found.append((name, unit))
    return found


def _curve(label: str, several: list[list[DropUnits]], right: Outcome, losses: Outcome) -> dict[str, Any]:
    accuracy = np.array([[right.of(v).mean(dtype=np.float64) for v in row] for row in several])
    loss = -np.array([[losses.of(v).mean(dtype=np.float64) for v in row] for row in several])
    ends = [_ends(right.of(v)) for v in several[0]] if len(several) == 1 else []
    return {
        "label": label,
        "orders": len(several),
        "accuracy": accuracy.mean(axis=0).tolist(),
        # Of one order: over images. Of several: the lowest and the highest of them.
        "low": [low for low, _ in ends] if ends else accuracy.min(axis=0).tolist(),
        "high": [high for _, high in ends] if ends else accuracy.max(axis=0).tolist(),
        "loss": loss.mean(axis=0).tolist(),
    }


def _ends(right: np.ndarray) -> tuple[float, float]:
    return wilson(int(right.sum()), len(right))


def _compare(curves: list[dict[str, Any]], variants: dict[str, list[list[DropUnits]]], right: Outcome) -> None:
    """The oracle minus every other order, image by image; p-values corrected over all of them."""
    (oracle,) = variants["greedy oracle"]
    made: list[dict[str, Any]] = []
    for curve in curves[1:]:
        curve["behind"] = []
        for at, variant in enumerate(oracle):
            rows = [right.of(row[at]) for row in variants[curve["label"]]]
            if len(rows) == 1:
                got = paired_examples(right.of(variant), rows[0])
            else:
                got = paired_examples(
                    right.of(variant).astype(np.float64), np.stack(rows).mean(axis=0, dtype=np.float64)
                )
            item = {"mean": got.mean, "low": got.low, "high": got.high, "p": got.p}
            curve["behind"].append(item)
            # The whole network is the same in all orders.
            if at and got.p is not None:
                made.append(item)
    for item, p in zip(made, holm([item["p"] for item in made]), strict=True):
        item["p_holm"] = p


def _left(found: GreedyOracle, step: int, min_keep: int) -> int:
    left = dict(found.units)
    for layer, _ in found.order[:step]:
        left[layer] -= 1
    return sum(number for number in left.values() if number > min_keep)


def _label(plugin: dict[str, Any], spec: OracleSpec) -> str:
    name = str(plugin["name"])
    if sum(other["name"] == name for other in spec.criteria) == 1:
        return name
    return f"{name} ({', '.join(f'{k} {v}' for k, v in plugin.items() if k != 'name')})"
