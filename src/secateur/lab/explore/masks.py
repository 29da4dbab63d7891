"""Pruning along unit masks: those a network was trained with, others, and the L2 norm at the same counts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from secateur.core.groups import Groups
from secateur.core.statistics import holm, paired_difference
from secateur.core.targets import Target, Targets, find_targets
from secateur.errors import UsageError, VacuousProofError
from secateur.lab.explore.mask_cut import PROOF_INPUTS, cut_by_mask, cuttable, pool_masks, removable, removed_share
from secateur.lab.explore.mask_race import race_masks
from secateur.lab.explore.masks_spec import MasksSpec
from secateur.lab.explore.session import Session
from secateur.regularizers.mask_pool import MaskPoolDropout
from secateur.surgery.plan import make_plan
from secateur.variants.evaluate import evaluate_variants
from secateur.variants.kinds import UnitMasks, Variant
from secateur.variants.outcome import Outcome
from secateur.variants.unit_choice import UnitsByCriterion
from secateur.variants.workbench import Workbench

__all__ = ["masked", "run"]


def run(session: Session, spec: MasksSpec, folder: Path) -> dict[str, Any]:
    """Every rate and seed on the judged images; then, if asked, the race, whose winner is judged by the others.

    What stands in `folder` already (journals, a race that was run to its end) is not done again.
    """
    study = _Study(session, spec)
    # First: a network that cannot be cut along masks is refused before it costs anything.
    proofs = [study.proof(rate) for rate in spec.rates]
    outcome = evaluate_variants(
        study.bench,
        study.variants(),
        session.judged,
        recalibrate=session.renewing,
        journal=folder / "masks.jsonl",
        progress=study.progress,
    )
    rates = [{**study.rate(outcome, rate), "proof": p} for rate, p in zip(spec.rates, proofs, strict=True)]
    _adjust(rates)
    return {
        "images": int(outcome.values.shape[1]),
        "recalibrate": session.recipe.judge.recalibrate,
        "trained": study.trained,
        "layers": [{"name": t.module, "units": t.units} for t in study.targets],
        "coupled": [t.module for t in study.targets if _coupled(study.groups, t)],
        "parameters": sum(p.numel() for p in session.network.parameters()),
        "dense": float(outcome.of(_DENSE).mean()),
        "known": list(study.known),
        "unseen": list(study.unseen),
        "rates": rates,
        "race": None
        if spec.race is None
        else race_masks(session, spec.race, study.bench, study.groups, study.known, study.min_keep, folder),
    }


_DENSE = UnitMasks(0.0)


class _Study:
    """The network with the layers that are masked, and the seeds."""

    def __init__(self, session: Session, spec: MasksSpec) -> None:
        self.session, self.spec = session, spec
        self.groups: Groups = session.context.groups
        self.targets = masked(self.groups, session.targets, spec.groups)
        self.bench = Workbench(session.network, self.targets, batches=session.scored)
        self.trained = _trained(session)
        self.known, self.unseen = _seeds(session, spec, self.trained)
        self.min_keep = int(self.trained["min_keep"]) if self.trained else 1
        # Only shapes count what a cut removes.
        self._shapes = copy.deepcopy(session.network).to("meta")

    def mask(self, rate: float, seed: int) -> Variant:
        return UnitMasks(rate, seed, self.min_keep) if rate else _DENSE

    def kept(self, rate: float, seed: int) -> dict[str, Tensor]:
        return pool_masks(self.targets, rate, seed, self.min_keep)

    def control(self, rate: float, seed: int) -> Variant:
        """The units of lowest L2 norm removed, as many of each layer as the mask drops."""
        counts = {name: int((~keep).sum()) for name, keep in self.kept(rate, seed).items()}
        return UnitsByCriterion(removed=tuple(counts.items())) if any(counts.values()) else _DENSE

    def expected(self, rate: float) -> Variant:
        return UnitsByCriterion(rate) if rate else _DENSE

    def variants(self) -> list[Variant]:
        found: list[Variant] = [_DENSE]
        for rate in self.spec.rates:
            found.append(self.expected(rate))
            for seed in (*self.known, *self.unseen):
                found += [self.mask(rate, seed), self.control(rate, seed)]
        return found

    def progress(self, done: int, total: int) -> None:
        self.session.listener.check_stop()
        self.session.listener.advanced(done, f"{done} of {total} images through variants")

    def rate(self, outcome: Outcome, rate: float) -> dict[str, Any]:
        """What the JSON says of one rate."""
        count = int(outcome.values.shape[1])
        parts = {name: self._seeds(outcome, rate, seeds) for name, seeds in self._named()}
        l2 = UnitsByCriterion(rate).kept(self.bench) if rate else self.kept(0.0, 0)
        found: dict[str, Any] = {
            "rate": rate,
            **dict.fromkeys(("known", "unseen")),
            **parts,
            "l2": {"accuracy": float(outcome.of(self.expected(rate)).mean()), "removed": self._removed(l2)},
            "known_against_unseen": None,
        }
        for part in parts.values():
            masks, control = dict(enumerate(part["accuracies"])), dict(enumerate(part["control"]["accuracies"]))
            part["against_control"] = _interval(paired_difference(masks, control, count=count))
        if len(parts) == 2 and rate:
            found["known_against_unseen"] = _ranks(parts["known"]["accuracies"], parts["unseen"]["accuracies"])
        return found

    def _named(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(n, s) for n, s in (("known", self.known), ("unseen", self.unseen)) if s]

    def _seeds(self, outcome: Outcome, rate: float, seeds: Sequence[int]) -> dict[str, Any]:
        masks = [self.mask(rate, seed) for seed in seeds]
        removed = [self._removed(self.kept(rate, seed)) for seed in seeds]
        return {
            **_summary(outcome, masks),
            "removed": removed,
            "median_removed": float(np.median(removed)),
            "control": _summary(outcome, [self.control(rate, seed) for seed in seeds]),
        }

    def _removed(self, kept: Mapping[str, Tensor]) -> float:
        chosen = removable(self.groups, self.targets, kept)
        if all(bool(k.all()) for k in chosen.values()):
            return 0.0
        return removed_share(self._shapes, make_plan(self._shapes, self.groups, chosen))

    def proof(self, rate: float) -> dict[str, Any] | None:
        """The first mask cut; None if so little is left that a comparison proves nothing."""
        seed = (*self.known, *self.unseen)[0]
        try:
            cut = cut_by_mask(
                self.session.network,
                rate,
                seed,
                self.session.context.example(PROOF_INPUTS),
                targets=self.targets,
                groups=self.groups,
                min_keep=self.min_keep,
            )
        except VacuousProofError:
            return None
        names = ("parameters_before", "parameters_after", "max_abs_diff", "scale", "tolerance", "inputs")
        return {"seed": seed, **{name: getattr(cut, name) for name in names}}


def masked(groups: Groups, targets: Targets, which: str) -> Targets:
    """The layers that are masked, all of which can be cut.

    Args:
        which: "all" targets, or those of "inner" groups alone.

    Raises: `UsageError` naming a layer that cannot be cut.
    """
    if which == "inner":
        names = {p for g in groups.inner() for p in g.producers}
        targets = Targets([t for t in targets if names & {t.name, *t.aliases}])
        if not targets:
            raise UsageError("masks: groups inner leaves no layer; every one is part of a residual sum or excluded")
    cuttable(groups, targets)
    return targets


def _coupled(groups: Groups, target: Target) -> bool:
    return any(g.coupled and {target.name, *target.aliases} & set(g.producers) for g in groups)


def _trained(session: Session) -> dict[str, Any] | None:
    """The mask pool the network was trained under here; None for any other training."""
    plugin = session.recipe.regularizer
    if session.recipe.weights is not None or plugin["name"] != "mask_pool":
        return None
    spec = MaskPoolDropout(**{k: v for k, v in plugin.items() if k != "name"})
    (method,) = session.context.recipe.methods
    layers = [t.module for t in find_targets(session.network, method.include, method.exclude)]
    return {"drop_rate": spec.drop_rate, "pool": spec.pool, "min_keep": spec.min_keep, "layers": layers}


def _seeds(
    session: Session, spec: MasksSpec, trained: dict[str, Any] | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Seeds the network was trained with, and others."""
    pool = range((trained or {}).get("pool") or 0)
    known = tuple(pool) if spec.known is None else spec.known
    if session.recipe.weights is None and not set(known) <= set(pool):
        name = session.recipe.regularizer["name"]
        raise UsageError(
            f"masks.known: seed {min(set(known) - set(pool))} is none that the network is trained with under {name}, "
            f"whose pool has {len(pool)}; leave it out"
        )
    avoid = {*known, *pool}
    unseen = [s for s in range(spec.unseen + len(avoid)) if s not in avoid][: spec.unseen]
    return known, tuple(unseen)


def _summary(outcome: Outcome, variants: Sequence[Variant]) -> dict[str, Any]:
    found = outcome.spread(variants)
    accuracies = [float(outcome.of(v).mean()) for v in variants]
    quarters = np.quantile(accuracies, (0.25, 0.5, 0.75))
    return {
        "accuracies": accuracies,
        "lowest": found.low,
        "lower_quartile": float(quarters[0]),
        "median": float(quarters[1]),
        "upper_quartile": float(quarters[2]),
        "highest": found.high,
        "mean": found.mean,
        "deviation": found.deviation,
        "interval": _interval(found.interval),
    }


def _interval(found: Any) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("mean", "low", "high", "n", "method", "p")}


def _ranks(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Whether masks of one kind do better than those of the other; masks are the repetitions."""
    from scipy.stats import mannwhitneyu

    p = 1.0 if len(set(a) | set(b)) == 1 else float(mannwhitneyu(a, b, method="auto").pvalue)
    return {
        "medians": float(np.median(a) - np.median(b)),
        "p": p,
        "test": "Mann-Whitney U test, two-sided, masks as repetitions",
    }


def _adjust(rates: Sequence[dict[str, Any]]) -> None:
    """Holm's correction over all rates, of each question by itself."""
    seeds = [r["known_against_unseen"] for r in rates if r["known_against_unseen"] is not None]
    control = [r[kind]["against_control"] for r in rates if r["rate"] for kind in ("known", "unseen") if r[kind]]
    for question in (seeds, control):
        found = [item for item in question if item["p"] is not None]
        for item, adjusted in zip(found, holm([item["p"] for item in found]), strict=True):
            item["p_adjusted"] = adjusted
