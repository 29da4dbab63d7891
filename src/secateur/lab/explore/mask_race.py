"""The best of very many masks: raced on the judged images, measured on images no choice was made by, and cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from secateur.core.groups import Groups
from secateur.core.statistics import paired_examples, wilson
from secateur.errors import VacuousProofError
from secateur.lab.explore.mask_cut import PROOF_INPUTS, MaskCut, cut_by_mask
from secateur.lab.explore.masks_spec import MaskRaceSpec
from secateur.lab.explore.session import Session
from secateur.lab.store import read_json, write_json
from secateur.surgery.file import load_pruned, save_pruned
from secateur.surgery.verify import max_difference
from secateur.variants.evaluate import evaluate_variants, right_or_wrong
from secateur.variants.kinds import UnitMasks
from secateur.variants.race import Arm
from secateur.variants.racing import race_variants
from secateur.variants.workbench import Workbench

__all__ = ["race_masks"]


def race_masks(
    session: Session,
    spec: MaskRaceSpec,
    bench: Workbench,
    groups: Groups,
    known: Sequence[int],
    min_keep: int,
    folder: Path,
) -> dict[str, Any]:
    """The winner of `spec.candidates` masks, what it is worth on the held images, and its network as a file.

    BatchNorm keeps the network's own statistics throughout, also where variants are given new ones elsewhere: what is
    raced is what is cut.
    """
    avoid = set() if spec.known else set(known)
    # The first seeds compete; those after them, by which nothing is chosen, stand for masks as they come.
    seeds = [s for s in range(spec.candidates + spec.random + len(avoid)) if s not in avoid]
    candidates = [UnitMasks(spec.rate, seed, min_keep) for seed in seeds[: spec.candidates]]
    found = _race(session, spec, bench, candidates, folder / "race.json")
    winner = UnitMasks(spec.rate, found["seed"], min_keep)
    others = [UnitMasks(spec.rate, seed, min_keep) for seed in seeds[spec.candidates :][: spec.random]]

    def progress(done: int, total: int) -> None:
        session.listener.check_stop()
        session.listener.advanced(done, f"{done} of {total} held images through variants")

    def evaluate(batches: Any, name: str) -> Any:
        return evaluate_variants(
            bench, [winner, *others, UnitMasks(0.0)], batches, journal=folder / name, progress=progress
        )

    held, judged = evaluate(session.held, "race-held.jsonl"), evaluate(session.judged, "race-judged.jsonl")
    values = held.values.astype(np.float64)
    ahead = paired_examples(values[0], values[1:-1].mean(axis=0))
    right, count = int(held.values[0].sum()), int(held.values.shape[1])
    low, high = wilson(right, count)
    means = held.means()
    return {
        **found,
        "rate": spec.rate,
        "candidates": spec.candidates,
        "error": spec.error,
        "known": found["seed"] in known,
        "known_took_part": spec.known and bool(known),
        "judged": {
            "images": int(judged.values.shape[1]),
            "winner": float(judged.means()[0]),
            "random": float(judged.means()[1:-1].mean()),
            "dense": float(judged.means()[-1]),
        },
        "held": {
            "images": count,
            "winner": right / count,
            "low": low,
            "high": high,
            "random": float(means[1:-1].mean()),
            "random_accuracies": [float(m) for m in means[1:-1]],
            "dense": float(means[-1]),
            "ahead": {name: getattr(ahead, name) for name in ("mean", "low", "high", "n", "method", "p")},
        },
        "delivered": _deliver(session, winner, bench, groups, folder / "best-mask.safetensors"),
    }


def _race(
    session: Session, spec: MaskRaceSpec, bench: Workbench, candidates: Sequence[UnitMasks], path: Path
) -> dict[str, Any]:
    if path.is_file():
        return dict(read_json(path))

    def score(outputs: Tensor, labels: Tensor) -> Tensor:
        session.listener.check_stop()
        return right_or_wrong(outputs, labels)

    result = race_variants(
        bench,
        [Arm((mask,)) for mask in candidates],
        session.judged,
        score=score,
        batch_size=session.batch_size,
        error=spec.error,
        first=spec.first,
    )
    found = {
        "seed": candidates[result.winners[0]].seed,
        "value": result.values[result.winners[0]],
        "rungs": [{"images": r.examples, "alive": r.alive} for r in result.rungs],
        "evaluated": result.evaluated,
        "full": result.full,
    }
    write_json(path, found)
    return dict(json.loads(json.dumps(found)))


def _deliver(
    session: Session, winner: UnitMasks, bench: Workbench, groups: Groups, path: Path
) -> dict[str, Any] | None:
    """The winner cut, proven, saved, and loaded again, which is tried on the held images; None if nothing of it is
    left that could be proven."""
    context = session.context
    example = context.example(PROOF_INPUTS)
    rate, seed, min_keep = winner.drop_rate, winner.seed, winner.min_keep
    try:
        cut = cut_by_mask(session.network, rate, seed, example, targets=bench.targets, groups=groups, min_keep=min_keep)
    except VacuousProofError:
        return None
    _save(session, cut, winner, path)
    reloaded: nn.Module = load_pruned(path, device=context.runtime.device, allow_code=context.options.allow_code)
    right, count = session.accuracy(reloaded, session.held)
    names = ("parameters_before", "parameters_after", "removed", "max_abs_diff", "scale", "tolerance", "inputs")
    return {
        **{name: getattr(cut, name) for name in names},
        "path": str(path),
        "bytes": path.stat().st_size,
        "reload_max_abs_diff": max_difference(cut.network, reloaded, example),
        "accuracy": right / count,
        "images": count,
    }


def _save(session: Session, cut: MaskCut, winner: UnitMasks, path: Path) -> None:
    builder, kwargs = session.context.builder
    extra = {"data": session.context.data.name, "recipe": session.recipe.name, "mask": winner.record()}
    plans = [] if cut.plan is None else [cut.plan]
    inputs = session.context.example(1)
    save_pruned(path, cut.network, builder=builder, kwargs=kwargs, plan=plans, inputs=inputs, extra=extra)
