"""Populations of networks pruned with noise, beside the one pruned without."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.analysis.latency import median_interval
from secateur.core.statistics import above, holm, paired_examples
from secateur.lab.explore.session import Session
from secateur.lab.explore.specs import NoiseSpec
from secateur.lab.report.explore.noise import pays
from secateur.variants.evaluate import evaluate_variants
from secateur.variants.kinds import NoisyPrune, Source
from secateur.variants.outcome import Outcome
from secateur.variants.workbench import Workbench

__all__ = ["run"]

_WAYS: dict[str, tuple[Source, Source]] = {
    "noisy": ("noisy", "noisy"),
    "noisy mask, plain weights": ("dense", "noisy"),
    "plain mask, noisy weights": ("noisy", "dense"),
}


def run(session: Session, spec: NoiseSpec, folder: Path) -> dict[str, Any]:
    """The cells of the grid, the steps to where noise begins to pay, and the best cell on images held back."""
    work = _Work(session, spec, folder / "variants.jsonl")
    sigmas = sorted(s for s in spec.sigmas if s > 0.0)
    cells = work.cells([(sigma, sparsity) for sparsity in sorted(spec.sparsities) for sigma in sigmas])
    steps: list[dict[str, Any]] = []
    crossings = []
    for sigma in sigmas if spec.crossover else ():
        below, first = _bracket(cells, sigma)
        for _ in range(spec.crossover):
            if below is None or first is None:
                break
            (step,) = work.cells([(sigma, (below + first) / 2)])
            steps.append(step)
            below, first = (below, step["sparsity"]) if pays(step) else (step["sparsity"], first)
        crossings.append({"sigma": sigma, "below": below, "pays": first})
    result: dict[str, Any] = {
        "criterion": work.label,
        "count": session.counts[0],
        "dense": work.means([work.plain(0.0)])[0],
        "layers": [target.module for target in session.targets],
        "weights": sum(target.numel for target in session.targets),
        "plain": [{"sparsity": s, "accuracy": work.means([work.plain(s)])[0]} for s in sorted({0.0, *spec.sparsities})],
        "cells": cells,
        "steps": steps,
        "crossings": crossings,
        "confirmed": None,
        "cost": work.cost,
    }
    if spec.confirm:
        best = max(cells, key=lambda cell: cell["gain"])
        held = _Work(session, spec, folder / "held.jsonl", held=True)
        (again,) = held.cells([(best["sigma"], best["sparsity"])])
        result["confirmed"] = {"count": session.counts[1], **again}
    return result


class _Work:
    """Evaluates cells; every variant is made once, and what a stopped run left is not done again."""

    def __init__(self, session: Session, spec: NoiseSpec, journal: Path, held: bool = False) -> None:
        self.session, self.spec, self.held, self._journal = session, spec, held, journal
        self.label = str(spec.criterion["name"])
        self.bench: Workbench = session.bench({self.label: spec.criterion})
        self.cost = {"made": 0, "examples": 0, "recalibration": 0}

    def plain(self, sparsity: float) -> NoisyPrune:
        return NoisyPrune(0.0, sparsity, 0, self.label, self.spec.scope)

    def population(self, sigma: float, sparsity: float, way: str = "noisy") -> list[NoisyPrune]:
        weights, mask = _WAYS[way]
        # What confirms a choice shares neither images nor noise with what it was chosen by.
        first = self.spec.first_seed + (self.spec.variants if self.held else 0)
        return [
            NoisyPrune(sigma, sparsity, seed, self.label, self.spec.scope, weights, mask)
            for seed in range(first, first + self.spec.variants)
        ]

    def means(self, variants: Sequence[NoisyPrune]) -> list[float]:
        return [float(mean) for mean in self._evaluate(variants).means()]

    def cells(self, points: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
        """What is known of every (sigma, sparsity), with p-values corrected over all of them."""
        ways = list(_WAYS) if self.spec.transfer else ["noisy"]
        wanted = [self.plain(sparsity) for _, sparsity in points]
        wanted += [v for point in points for way in ways for v in self.population(*point, way)]
        outcome = self._evaluate(list(dict.fromkeys(wanted)))
        cells = []
        for sigma, sparsity in points:
            plain = outcome.of(self.plain(sparsity))
            found = {way: _population(outcome, self.population(sigma, sparsity, way), plain) for way in ways}
            cell = {"sigma": sigma, "sparsity": sparsity, "plain": float(plain.mean()), **found.pop("noisy")}
            cells.append({**cell, "transfer": found})
        for side in ("gain", "loss"):
            # Beyond the chance of the seeds and of the images, both.
            worst = [max(cell[f"p_{side}_seeds"], cell[f"p_{side}_images"]) for cell in cells]
            for cell, p in zip(cells, holm(worst), strict=True):
                cell[f"p_{side}"] = p
        return cells

    def _evaluate(self, variants: Sequence[NoisyPrune]) -> Outcome:
        listener = self.session.listener

        def progress(done: int, of: int) -> None:
            listener.advanced(done, f"{done} of {of} evaluations")
            listener.check_stop()

        batches: Iterable[Any] = self.session.held if self.held else self.session.judged
        outcome = evaluate_variants(
            self.bench,
            variants,
            batches,
            recalibrate=self.session.renewing,
            journal=self._journal,
            progress=progress,
        )
        for name in self.cost:
            self.cost[name] += getattr(outcome.cost, name)
        return outcome


def _population(outcome: Outcome, variants: Sequence[NoisyPrune], plain: np.ndarray) -> dict[str, Any]:
    """A population against the network without noise: over its seeds, and over the images."""
    rows = np.stack([outcome.of(variant) for variant in variants])
    values = rows.mean(axis=1, dtype=np.float64)
    # Fewer than six values enclose their median in no 95 % interval.
    low, high = median_interval(values.tolist()) if len(values) >= 6 else (None, None)
    constant = float(plain.mean())
    p_gain, test = above(values.tolist(), constant)
    p_loss, _ = above((-values).tolist(), -constant)
    images = paired_examples(rows.mean(axis=0, dtype=np.float64), plain.astype(np.float64))
    gain = float(values.mean() - plain.mean())
    # One side of a test of both; without any spread there is nothing to tell.
    half = 0.5 if images.p is None else images.p / 2
    p_up = half if gain > 0 else 1.0 - half
    return {
        "accuracies": values.tolist(),
        "median": float(np.median(values)),
        "median_low": low,
        "median_high": high,
        "gain": gain,
        "gain_low": images.low,
        "gain_high": images.high,
        "p_gain_seeds": p_gain,
        "p_gain_images": p_up,
        "p_loss_seeds": p_loss,
        "p_loss_images": 1.0 - p_up,
        "test": test,
    }


def _bracket(cells: Sequence[dict[str, Any]], sigma: float) -> tuple[float | None, float | None]:
    """The last sparsity before noise of this sigma begins to pay, and the first at which it does."""
    below = None
    for cell in (c for c in cells if c["sigma"] == sigma):
        if pays(cell):
            return below, cell["sparsity"]
        below = cell["sparsity"]
    return below, None
