"""What pruning, with and without noise, does to the inside of a network: one part for each thing looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.analysis.connectivity import disconnected_layers
from secateur.analysis.feature_variance import feature_variance, variance_ratio
from secateur.analysis.gradient_flow import gradient_flow
from secateur.analysis.hessian import hessian_form
from secateur.analysis.stability import collapsed_layers, mask_overlap
from secateur.analysis.weight_cdf import weight_cdf
from secateur.core.masks import Masks
from secateur.errors import NoEffectError, UsageError
from secateur.lab.explore.analyses_spec import AnalysesSpec
from secateur.lab.explore.dependence import dependence
from secateur.lab.explore.mc_dropout import mc_dropout
from secateur.lab.explore.session import Session
from secateur.lab.store import read_json, write_json
from secateur.sparsify.ranking import SelectionRule
from secateur.variants.evaluate import evaluate_variants
from secateur.variants.greedy import negative_cross_entropy
from secateur.variants.kinds import NoisyPrune, Variant
from secateur.variants.workbench import Workbench

__all__ = ["run"]

Cell = tuple[float, float]


def run(session: Session, spec: AnalysesSpec, folder: Path) -> dict[str, Any]:
    """A part for each thing asked for; parts that a stopped run finished are read again."""
    work = Work(session, spec, folder)
    parts = []
    for number, what in enumerate(spec.what):
        session.listener.check_stop()
        session.listener.advanced(number, what)
        file = folder / f"{what}.json"
        if not file.is_file():
            write_json(file, {"what": what, **_PARTS[what](work)})
        parts.append(read_json(file))
    return {
        "criterion": work.label,
        "layers": [target.module for target in session.targets],
        "weights": sum(target.numel for target in session.targets),
        "images": sum(len(labels) for _, labels in work.batches),
        "count": session.counts[0],
        "parts": parts,
    }


@dataclass
class Work:
    """What the parts share."""

    session: Session
    spec: AnalysesSpec
    folder: Path

    @property
    def label(self) -> str:
        return str(self.spec.criterion["name"])

    @property
    def network(self) -> nn.Module:
        return self.session.network

    @cached_property
    def bench(self) -> Workbench:
        return self.session.bench({self.label: self.spec.criterion})

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        return self.session.training_images(self.spec.images)

    @property
    def cells(self) -> list[Cell]:
        """(sigma, sparsity), every pair."""
        return [(sigma, sparsity) for sigma in sorted(self.spec.sigmas) for sparsity in sorted(self.spec.sparsities)]

    def module(self, name: str) -> str:
        return self.bench.target(name).module

    def variant(self, sigma: float, sparsity: float, seed: int) -> NoisyPrune:
        return NoisyPrune(sigma, sparsity, seed, self.label, self.spec.scope)

    def population(self, sigma: float, sparsity: float) -> list[NoisyPrune]:
        """One network for each seed; without noise there is only one."""
        seeds = range(self.spec.variants if sigma else 1)
        return [self.variant(sigma, sparsity, seed) for seed in seeds]

    @contextmanager
    def made(self, variant: Variant) -> Iterator[nn.Module]:
        """The network as a variant; a good moment to stop is before."""
        self.session.listener.check_stop()
        with self.bench.variant(variant) as model:
            yield model

    def masks(self, sigma: float, sparsity: float, seed: int) -> Masks:
        """What a variant keeps: the criterion's choice among its noisy weights."""
        with self.made(self.variant(sigma, 0.0, seed)):
            return self.bench.masks(self.label, sparsity, SelectionRule(scope=self.spec.scope, seed=seed))


def _feature_variance(work: Work) -> dict[str, Any]:
    known: dict[NoisyPrune, Any] = {}

    def variances(sigma: float, sparsity: float) -> list[Any]:
        for variant in work.population(sigma, sparsity):
            if variant not in known:
                with work.made(variant) as model:
                    known[variant] = feature_variance(model, work.batches, targets=work.session.targets)
        return [known[variant] for variant in work.population(sigma, sparsity)]

    cells = []
    for sigma, sparsity in work.cells:
        pruned, dense = variances(sigma, sparsity), variances(sigma, 0.0)
        ratio = variance_ratio(pruned, dense)
        alone = [variance_ratio(a, b).mean for a, b in zip(pruned, dense, strict=True)]
        means = [mean for mean in alone if mean is not None]
        cells.append(
            {
                "sigma": sigma,
                "sparsity": sparsity,
                "networks": len(pruned),
                "mean": ratio.mean,
                "low": min(means, default=None),
                "high": max(means, default=None),
                "layers": {work.module(name): value for name, value in ratio.layers.items()},
            }
        )
    return {"cells": cells}


def _gradient_flow(work: Work) -> dict[str, Any]:
    def norms(sigma: float, sparsity: float) -> dict[str, Any]:
        found: dict[str, list[float]] = {"all": [], "kept": []}
        for variant in work.population(sigma, sparsity):
            with work.made(variant) as model:
                for name, masked in (("all", False), ("kept", True)):
                    flow = gradient_flow(model, work.batches, targets=work.session.targets, masked=masked)
                    found[name].append(flow.norm)
        return {"sigma": sigma, "sparsity": sparsity, **found}

    return {"dense": norms(0.0, 0.0), "cells": [norms(*cell) for cell in work.cells]}


def _weight_cdf(work: Work) -> dict[str, Any]:
    # Four a decade; those asked for are among them.
    grid = sorted({*(10.0 ** (at / 4) for at in range(-20, 5)), *work.spec.sigmas})
    found = weight_cdf(work.network, grid, targets=work.session.targets)
    return {
        "sigmas": grid,
        "asked": sorted(work.spec.sigmas),
        "shares": found.shares,
        "layers": {work.module(name): shares for name, shares in found.layers.items()},
        "counted": sum(found.counted.values()),
    }


def _mask_overlap(work: Work) -> dict[str, Any]:
    cells = []
    for sigma, sparsity in work.cells:
        if not sigma or not sparsity or work.spec.variants < 2:
            continue
        noisy = [work.masks(sigma, sparsity, seed) for seed in range(work.spec.variants)]
        plain = work.masks(0.0, sparsity, 0)
        found = mask_overlap(noisy)
        cells.append(
            {
                "sigma": sigma,
                "sparsity": sparsity,
                "masks": len(noisy),
                "kept": list(found.overall.kept),
                "removed": list(found.overall.removed),
                "with_plain": [mask_overlap([plain, mask]).overall.mean_kept for mask in noisy],
                # Two masks that keep a share k each, drawn without looking, share k / (2 - k) on average.
                "by_chance": (1 - sparsity) / (1 + sparsity),
                "layers": {work.module(name): o.mean_kept for name, o in found.layers.items()},
            }
        )
    return {"cells": cells}


def _collapse(work: Work) -> dict[str, Any]:
    cells, followed = [], ""
    sample = work.batches[0][0][:1]
    for sigma, sparsity in work.cells:
        for seed in range(work.spec.variants if sigma else 1):
            masks = work.masks(sigma, sparsity, seed)
            found = list(collapsed_layers(masks, below=work.spec.thin))
            try:
                found += [] if followed else disconnected_layers(work.network, masks, sample)
            except UsageError as error:
                followed = str(error)
            named = [{"layer": work.module(c.layer), "kept": c.kept, "of": c.total, "reason": c.reason} for c in found]
            shares = {work.module(name): float(mask.double().mean()) for name, mask in masks.items()}
            cells.append({"sigma": sigma, "sparsity": sparsity, "seed": seed, "found": named, "layers": shares})
    return {"thin": work.spec.thin, "cells": cells, "not_followed": followed or None}


def _hessian(work: Work) -> dict[str, Any]:
    cells: list[dict[str, Any]] = []
    levels = [sparsity for sparsity in sorted(work.spec.sparsities) if sparsity]
    variants = [work.variant(0.0, sparsity, 0) for sparsity in (0.0, *levels)]
    losses = evaluate_variants(work.bench, variants, work.batches, score=negative_cross_entropy).means()
    for sparsity, loss in zip(levels, losses[1:], strict=True):
        work.session.listener.check_stop()
        try:
            found = hessian_form(work.network, work.batches, work.masks(0.0, sparsity, 0))
        except NoEffectError:
            continue
        except UsageError as error:
            return {"cells": [], "none": str(error)}
        cells.append(
            {
                "sparsity": sparsity,
                "slope": found.slope,
                "value": found.value,
                "predicted": found.loss_change,
                "measured": float(losses[0] - loss),
                "layers": {work.module(name): value for name, value in found.layers.items()},
            }
        )
    return {"cells": cells, "none": None}


def _spread(work: Work) -> dict[str, Any]:
    populations = {cell: work.population(*cell) for cell in work.cells}
    outcome = evaluate_variants(
        work.bench,
        list(dict.fromkeys(v for several in populations.values() for v in several)),
        work.session.judged,
        recalibrate=work.session.renewing,
        journal=work.folder / "spread.jsonl",
        progress=lambda done, of: work.session.listener.check_stop(),
    )
    cells = []
    for (sigma, sparsity), several in populations.items():
        found = outcome.spread(several)
        cells.append(
            {
                "sigma": sigma,
                "sparsity": sparsity,
                "networks": len(several),
                "mean": found.mean,
                "deviation": found.deviation,
                "lowest": found.low,
                "highest": found.high,
                "low": found.interval.low,
                "high": found.interval.high,
                "method": found.interval.method,
            }
        )
    return {"cells": cells}


def _mc_dropout(work: Work) -> dict[str, Any]:
    return mc_dropout(work.session, work.spec)


def _weight_dependence(work: Work) -> dict[str, Any]:
    return dependence(work.session, work.spec, lambda sparsity: work.masks(0.0, sparsity, 0))


_PARTS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "feature_variance": _feature_variance,
    "gradient_flow": _gradient_flow,
    "weight_cdf": _weight_cdf,
    "mask_overlap": _mask_overlap,
    "collapse": _collapse,
    "hessian": _hessian,
    "spread": _spread,
    "mc_dropout": _mc_dropout,
    "weight_dependence": _weight_dependence,
}
