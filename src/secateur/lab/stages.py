"""The stages of a run: train once, prune many times."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from secateur.analysis.cost import measure_cost
from secateur.analysis.latency import Latency, measure_latency
from secateur.core.groups import Groups
from secateur.core.targets import find_targets
from secateur.errors import VacuousProofError
from secateur.lab.checkpoint import fitting, load_tensors, save_tensors
from secateur.lab.context import Context
from secateur.lab.plugins import make_criterion, make_regularizer
from secateur.lab.recipe import MethodSpec, PruneSpec
from secateur.lab.store import Stage
from secateur.lab.train import train
from secateur.registry import code_hash
from secateur.sparsify.ranking import SelectionRule, UnitRanking, rank, rank_units
from secateur.surgery.cut import cut_
from secateur.surgery.plan import make_plan
from secateur.surgery.verify import cut_verified_

__all__ = [
    "latency_stage",
    "prune_stage",
    "run_latency",
    "run_prune",
    "run_train",
    "train_stage",
    "trained_model",
    "unit_ranking",
]

_PROOF_INPUTS = 16


def train_stage(context: Context, method: MethodSpec, seed: int) -> Stage:
    """Training one seed under one method. Its label is no part of the key: equal trainings are shared."""
    recipe = context.recipe
    return context.store.stage(
        "train",
        {
            "data": {**recipe.data.model_dump(mode="json"), "fingerprint": context.data.fingerprint},
            "model": recipe.model.model_dump(mode="json"),
            "train": recipe.train.model_dump(mode="json"),
            "regularizer": method.regularizer,
            "code": _code(context, recipe.model.name, method.regularizer["name"]),
            "include": list(method.include),
            "exclude": list(method.exclude),
            "seed": seed,
            "device": context.runtime.device.type,
        },
    )


def _code(context: Context, *names: str) -> list[str | None]:
    """What the caller's own code contributes to a stage's key: editing it is another stage."""
    return [code_hash(name, context.options.allow_code) for name in names]


def run_train(context: Context, method: MethodSpec, seed: int) -> dict[str, Any]:
    stage = train_stage(context, method, seed)
    with stage.work():
        if stage.done:
            return stage.result()
        model = context.model(seed)
        regularizer = make_regularizer(method.regularizer, context.options.allow_code)
        targets = None
        if method.include != ("*",) or method.exclude:
            targets = find_targets(model, method.include, method.exclude, regularizer.acts_on)
        outcome = train(
            model,
            context.loader(context.recipe.train, seed),
            context.recipe.train,
            runtime=context.runtime,
            regularizer=regularizer,
            folder=stage.folder,
            seed=seed,
            evaluation=lambda m: context.validate(m) or context.test(m),
            targets=targets,
            listener=context.listener,
        )
        values = asdict(outcome)
        save_tensors(stage.folder / "scores.safetensors", values.pop("scores"), {"seed": seed})
        save_tensors(stage.folder / "model.safetensors", model.state_dict(), {"seed": seed})
        finished = stage.finish({**values, "top1": context.test(model).top1})
        # Only now: until the result is there, the checkpoint is all that an interruption leaves.
        (stage.folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return finished


def trained_model(context: Context, method: MethodSpec, seed: int) -> nn.Module:
    """The network that `run_train` left."""
    path = train_stage(context, method, seed).folder / "model.safetensors"
    tensors, _ = load_tensors(path)
    with fitting(path):
        return context.model(seed, tensors)


def prune_stage(context: Context, method: MethodSpec, seed: int, spec: PruneSpec) -> Stage:
    """Pruning one trained network one way, at every sparsity."""
    settings = spec.model_dump(mode="json", exclude={"latency"})
    settings["code"] = _code(context, spec.criterion["name"])
    return context.store.stage("prune", {"train": train_stage(context, method, seed).key, **settings})


def run_prune(context: Context, method: MethodSpec, seed: int, spec: PruneSpec) -> list[dict[str, Any]]:
    """One row per sparsity, without the method's label."""
    stage = prune_stage(context, method, seed, spec)
    with stage.work():
        if not stage.done:
            model = trained_model(context, method, seed)
            rows = _unit_rows if spec.granularity == "unit" else _weight_rows
            stage.finish({"rows": [{**row, "stage": stage.key} for row in rows(context, model, seed, spec)]})
        return stage.result()["rows"]


def _rule(spec: PruneSpec, seed: int) -> SelectionRule:
    return SelectionRule(spec.scope, spec.allocation, spec.rounding, spec.min_keep, seed=seed)


def _weight_rows(context: Context, model: nn.Module, seed: int, spec: PruneSpec) -> Iterator[dict[str, Any]]:
    criterion = make_criterion(spec.criterion, context.options.allow_code)
    ranking = rank(
        model,
        criterion,
        granularity=spec.granularity,
        rule=_rule(spec, seed),
        targets=find_targets(model, spec.include, spec.exclude),
        batches=context.training_batches(),
    )
    dense = measure_cost(model, context.example(1))
    for sparsity in spec.sparsities:
        context.listener.check_stop()
        masks = ranking.masks(sparsity)
        with _borrowed_weights(model):
            masks.apply_(model)
            yield {
                **_row(context, model, spec, sparsity),
                "sparsity_got": masks.sparsity,
                "params_total": dense.params,
                "params_kept": dense.params - (masks.total - masks.kept),
                "macs": dense.macs,  # zeros are multiplied like any other number: only a cut saves MACs
                "layers": [{"name": n, "kept": kept, "total": size} for n, kept, size in masks.layers()],
            }


def unit_ranking(context: Context, model: nn.Module, seed: int, spec: PruneSpec) -> UnitRanking:
    """The units of a network, ranked as a recipe's prune entry says."""
    groups: Groups = context.groups.inner() if spec.groups == "inner" else context.groups.prunable()
    return rank_units(
        model,
        make_criterion(spec.criterion, context.options.allow_code),
        groups,
        rule=_rule(spec, seed),
        targets=find_targets(model, spec.include, spec.exclude),
        batches=context.training_batches(),
    )


def _unit_rows(context: Context, model: nn.Module, seed: int, spec: PruneSpec) -> Iterator[dict[str, Any]]:
    ranking = unit_ranking(context, model, seed, spec)
    dense = measure_cost(model, context.example(1))
    for sparsity in spec.sparsities:
        context.listener.check_stop()
        kept = ranking.kept(sparsity)
        smaller, difference = cut_copy(context, model, ranking, kept)
        cost = measure_cost(smaller, context.example(1))
        units = sum(k.numel() for k in kept.values())
        yield {
            **_row(context, smaller, spec, sparsity),
            "sparsity_got": 1.0 - sum(int(k.sum()) for k in kept.values()) / units,
            "params_total": dense.params,
            "params_kept": cost.params,
            "macs": cost.macs,
            "max_abs_diff": difference,
            "layers": [{"name": n, "kept": int(k.sum()), "total": k.numel()} for n, k in kept.items()],
        }


def cut_copy(
    context: Context, model: nn.Module, ranking: UnitRanking, kept: dict[str, Tensor]
) -> tuple[nn.Module, float | None]:
    """A cut copy of `model`, and max |masked - cut| on test images; the plain copy and 0 if nothing goes.

    The difference is None for a network so far gone that it gives one answer to everything: it is cut all the
    same, because its accuracy is a result too, but no comparison could prove anything.
    """
    smaller = copy.deepcopy(model)
    if all(bool(k.all()) for k in kept.values()):
        return smaller, 0.0
    plan = make_plan(smaller, ranking.groups, kept)
    try:
        return smaller, cut_verified_(smaller, plan, context.example(_PROOF_INPUTS)).max_abs_diff
    except VacuousProofError:
        cut_(smaller, plan)
        return smaller, None


def _row(context: Context, model: nn.Module, spec: PruneSpec, sparsity: float) -> dict[str, Any]:
    if spec.recalibrate:
        recalibrate_(model, context)
    tested, validated = context.test(model), context.validate(model)
    return {
        "granularity": spec.granularity,
        "criterion": spec.criterion["name"],
        "scope": spec.scope,
        "sparsity_asked": sparsity,
        "top1": tested.top1,
        "correct": tested.correct,
        "count": tested.count,
        "top5": tested.top5,
        "validation_top1": validated.top1 if validated else None,
        "fine_tuned": False,
    }


@torch.no_grad()
def recalibrate_(model: nn.Module, context: Context) -> None:
    """Re-estimate every BatchNorm's running statistics as plain averages over the training set."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    training = model.training
    model.eval()  # dropout would be noise in the statistics, and draw from the global generator
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for inputs, _ in context.training_batches():
        model(inputs)
    model.train(training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@contextmanager
def _borrowed_weights(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers are put back afterwards."""
    saved = {n: t.detach().clone() for n, t in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(saved)


def latency_stage(context: Context, method: MethodSpec, seed: int, spec: PruneSpec) -> Stage:
    """Cutting and timing one trained network at every sparsity."""
    return context.store.stage("latency", {"prune": prune_stage(context, method, seed, spec).key, "threads": 1})


def run_latency(context: Context, method: MethodSpec, seed: int, spec: PruneSpec) -> dict[float, dict[str, Any]]:
    """Latency by sparsity, all sparsities measured in turn in one run."""
    stage = latency_stage(context, method, seed, spec)
    with stage.work():
        if not stage.done:
            model = trained_model(context, method, seed)
            ranking = unit_ranking(context, model, seed, spec)
            cut = {str(s): cut_copy(context, model, ranking, ranking.kept(s))[0] for s in spec.sparsities}
            batch = min(64, len(context.data.test_labels))
            times = measure_latency(cut, context.example(batch), batch_size=batch, rounds=15, min_time=0.005)
            stage.finish({"latency": {name: latency_json(t) for name, t in times.items()}})
        return {float(name): t for name, t in stage.result()["latency"].items()}


def latency_json(latency: Latency) -> dict[str, Any]:
    """A latency as results store it."""
    wanted = ("median_ms", "low_ms", "high_ms", "n", "batch_size", "threads", "device")
    return {key: getattr(latency, key) for key in wanted}
