"""Networks pruned with noise and the one pruned without, before and after fine-tuning."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.core.masks import Masks
from secateur.core.statistics import paired_examples
from secateur.lab.data import evaluation_batches
from secateur.lab.evaluate import evaluate
from secateur.lab.explore.fine_tune_spec import FineTuneSpec
from secateur.lab.explore.paper_fine_tune import fine_tune_as_published, part_loader
from secateur.lab.explore.session import Session
from secateur.lab.plugins import make_regularizer
from secateur.lab.runtime import Runtime
from secateur.lab.store import read_json, write_json
from secateur.lab.train import train
from secateur.surgery.file import save_pruned
from secateur.variants.evaluate import evaluate_variants
from secateur.variants.kinds import NoisyPrune
from secateur.variants.renew import renew_statistics_
from secateur.variants.workbench import Workbench

__all__ = ["run"]


def run(session: Session, spec: FineTuneSpec, folder: Path) -> dict[str, Any]:
    """Accuracy of every network on the images held back, pruned and fine-tuned.

    Every training has a folder of its own below `folder`: one that was stopped goes on from its checkpoint, one that is
    finished is not done again. There the network is left too, as `pruned.safetensors`.
    """
    label = str(spec.criterion["name"])
    work = _Work(session, spec, session.bench({label: spec.criterion}))
    plain = NoisyPrune(0.0, spec.sparsity, 0, label, spec.scope)
    noisy = [NoisyPrune(spec.sigma, spec.sparsity, seed, label, spec.scope) for seed in range(spec.variants)]
    judged = _judged(session, work.bench, noisy, folder) if spec.choose == "best" else []
    # The first of the best, so that the choice is the same wherever it is made.
    chosen = [noisy[judged.index(max(judged))]] if judged else noisy
    networks = []
    for variant in (plain, *chosen):
        session.listener.check_stop()
        networks.append(work.network(variant, folder / (f"noise-{variant.seed}" if variant.sigma else "plain")))
    right, count = session.accuracy(session.network, session.held)
    first, *rows = (_right(found["wrong"], count) for found in networks)
    # Over the images: one noisy network against the plain one, or how often an image is right among the noisy ones.
    difference = (
        paired_examples(rows[0], first)
        if len(rows) == 1
        else paired_examples(np.stack(rows).mean(axis=0, dtype=np.float64), first.astype(np.float64))
    )
    return {
        "count": count,
        "judged_count": session.counts[0],
        "dense": right / count,
        "judged": judged,
        "networks": [{name: value for name, value in found.items() if name != "wrong"} for found in networks],
        "against": {name: getattr(difference, name) for name in ("mean", "low", "high", "p", "method")},
    }


def _judged(session: Session, bench: Workbench, noisy: list[NoisyPrune], folder: Path) -> list[float]:
    def progress(done: int, of: int) -> None:
        session.listener.advanced(done, f"{done} of {of} evaluations")
        session.listener.check_stop()

    journal = folder / "judged.jsonl"
    outcome = evaluate_variants(
        bench, noisy, session.judged, recalibrate=session.renewing, journal=journal, progress=progress
    )
    return [float(mean) for mean in outcome.means()]


def _right(wrong: list[int], count: int) -> np.ndarray:
    right = np.ones(count, dtype=bool)
    right[wrong] = False
    return right


class _Work:
    """Makes pruned networks and fine-tunes them, all alike."""

    def __init__(self, session: Session, spec: FineTuneSpec, bench: Workbench) -> None:
        self.session, self.spec, self.bench = session, spec, bench

    def network(self, variant: NoisyPrune, folder: Path) -> dict[str, Any]:
        """One network before and after; from `folder` where it is there."""
        session, done = self.session, folder / "network.json"
        if done.is_file():
            found: dict[str, Any] = read_json(done, "delete it to fine-tune that network again")
            return found
        model, masks = self._pruned(variant)
        before = _wrong(session, model)
        session.listener.message(f"fine-tuning {folder.name}: sigma {variant.sigma:g}, {masks.sparsity:.1%} removed")
        started = time.perf_counter()
        steps, part = self._fitted(model, masks, folder)
        seconds, after = time.perf_counter() - started, _wrong(session, model)
        count = session.counts[1]
        file = self._save(model, masks, folder)
        found = {
            "sigma": variant.sigma,
            "seed": variant.seed if variant.sigma else None,
            "sparsity": masks.sparsity,
            "before": 1.0 - len(before) / count,
            "after": 1.0 - len(after) / count,
            "part": part,
            "steps": steps,
            "seconds": seconds,
            "file": f"{folder.name}/{file.name}",
            "bytes": file.stat().st_size,
            "wrong": after,
        }
        write_json(done, found)
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return found

    def _pruned(self, variant: NoisyPrune) -> tuple[nn.Module, Masks]:
        """A copy of the network as `variant`, and what of it is not zero."""
        with self.bench.variant(variant) as model:
            pruned = copy.deepcopy(model).eval()
        tensors = self.session.targets.tensors(pruned)
        if self.session.renewing is not None:
            renew_statistics_(pruned, self.session.renewing)
        return pruned, Masks({name: tensor.detach() != 0 for name, tensor in tensors.items()})

    def _fitted(self, model: nn.Module, masks: Masks, folder: Path) -> tuple[int, float | None]:
        """Fine-tune in place: steps, and where the preset trains on a part of the images, accuracy on that part."""
        session, spec = self.session, self.spec
        folder.mkdir(parents=True, exist_ok=True)
        context, seed, listener = session.context, session.recipe.seed, session.listener
        if spec.paper:
            loader, targets = part_loader(context.data, spec.images, seed), session.targets
            steps = fine_tune_as_published(
                model, loader, masks, targets, spec.epochs, folder=folder, seed=seed, listener=listener
            )
            batches = evaluation_batches(
                loader.images, loader.labels, loader.batch_size, normalize=context.data.normalize
            )
            right, count = session.accuracy(model, [context.runtime.to_device(*batch) for batch in batches])  # type: ignore[misc]
            return steps, right / count
        runtime = Runtime(context.options.device, spec.train.precision)
        outcome = train(
            model,
            context.loader(spec.train, seed),
            spec.train,
            runtime=runtime,
            regularizer=make_regularizer({"name": "none"}),
            folder=folder,
            seed=seed,
            # Never the images held back: `patience` and `keep` choose by what is measured here.
            evaluation=lambda m: evaluate(m, session.judged, runtime),
            masks=masks,
            listener=listener,
        )
        model.eval()
        return outcome.steps, None

    def _save(self, model: nn.Module, masks: Masks, folder: Path) -> Path:
        context = self.session.context
        builder, kwargs = context.builder
        extra = {"data": context.data.name, "recipe": self.session.recipe.name, "sparsity": masks.sparsity}
        return save_pruned(
            folder / "pruned.safetensors",
            model,
            builder=builder,
            kwargs=kwargs,
            plan=[],
            inputs=context.example(1),
            extra=extra,
            sparse=True,
        )


def _wrong(session: Session, model: nn.Module) -> list[int]:
    """Which images held back the network is wrong on, by position; it is in eval mode."""
    return torch.nonzero(~session.right(model, session.held)).flatten().tolist()
