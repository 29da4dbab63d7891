"""The stages of a run: train once, prune many times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from secateur.analysis.cost import measure_cost
from secateur.analysis.latency import Latency, measure_latency
from secateur.core.duration import Duration
from secateur.core.masks import Masks
from secateur.criteria import CRITERIA
from secateur.errors import UsageError
from secateur.lab.checkpoint import fitting, load_tensors, save_tensors
from secateur.lab.context import Context
from secateur.lab.models import MODELS
from secateur.lab.plugins import make_regularizer, running
from secateur.lab.recipe import MethodSpec, PruneSpec, TrainSpec
from secateur.lab.rows import cut_copy, stored_rows, unit_row, weight_row
from secateur.lab.store import Stage
from secateur.lab.train import TrainResult, train
from secateur.lab.ways import unit_ranking, weight_ranking
from secateur.regularizers import REGULARIZERS
from secateur.regularizers.attachment import targets_of

__all__ = [
    "criterion_code",
    "latency_json",
    "latency_stage",
    "learned_scores",
    "prune_stage",
    "rewind_step",
    "run_latency",
    "run_prune",
    "run_train",
    "train_stage",
    "train_under",
    "trained_model",
]


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
            "code": [
                context.code_hash(MODELS, recipe.model.name),
                context.code_hash(REGULARIZERS, method.regularizer["name"]),
            ],
            "include": list(method.include),
            "exclude": list(method.exclude),
            "seed": seed,
            "device": context.runtime.device.type,
            "snapshot": rewind_step(context, method, seed),
        },
    )


def rewind_step(context: Context, method: MethodSpec, seed: int) -> int | None:
    """The step a method's loop rewinds to, or None if it starts elsewhere."""
    if method.loop is None or method.loop.restart in ("init", "reinitialize", "trained"):
        return None
    spec = context.recipe.train
    per_epoch = context.loader(spec, seed).steps_per_epoch
    step, steps = (Duration.parse(text).steps(per_epoch) for text in (method.loop.restart, spec.duration))
    if not 0 < step < steps:
        raise UsageError(
            f'method "{method.label}": loop.restart {method.loop.restart} is step {step} of a training of {steps}; '
            "expected a step between the first and the last"
        )
    return step


def criterion_code(context: Context, way: PruneSpec) -> list[str | None]:
    """What a criterion that does not ship with secateur contributes to a stage's key: editing it is another stage."""
    return [context.code_hash(CRITERIA, way.criterion["name"])]


def run_train(context: Context, method: MethodSpec, seed: int) -> dict[str, Any]:
    stage = train_stage(context, method, seed)
    with stage.work():
        if stage.done:
            return stage.result(steps=int, seconds=float, final_loss=float, history=list, top1=float)
        model = context.model(seed)
        outcome = train_under(context, method, model, seed, stage, snapshot_at=rewind_step(context, method, seed))
        values = asdict(outcome)
        save_tensors(stage.folder / "scores.safetensors", values.pop("scores"), {"seed": seed})
        save_tensors(stage.folder / "model.safetensors", model.state_dict(), {"seed": seed})
        finished = stage.finish({**values, "top1": context.test(model).top1})
        # Only now: until the result is there, the checkpoint is all that an interruption leaves.
        (stage.folder / "checkpoint.safetensors").unlink(missing_ok=True)
        return finished


def train_under(
    context: Context,
    method: MethodSpec,
    model: nn.Module,
    seed: int,
    stage: Stage,
    *,
    spec: TrainSpec | None = None,
    masks: Masks | None = None,
    first_step: int = 0,
    snapshot_at: int | None = None,
) -> TrainResult:
    """Train `model` under the method's regularizer, as the recipe says or `spec`; checkpoints go to the stage."""
    spec = spec or context.recipe.train
    regularizer = make_regularizer(method.regularizer, context.options.allow_code)
    targets = None
    if method.include != ("*",) or method.exclude:
        targets = targets_of(regularizer, model, method.include, method.exclude)
    used = (REGULARIZERS, method.regularizer["name"]), (MODELS, context.recipe.model.name)
    with running(f'training "{method.label}", seed {seed}', *used, allow_code=context.options.allow_code):
        return train(
            model,
            context.loader(spec, seed),
            spec,
            runtime=context.runtime,
            regularizer=regularizer,
            folder=stage.folder,
            seed=seed,
            evaluation=lambda m: context.validate(m) or context.test(m),
            targets=targets,
            masks=masks,
            first_step=first_step,
            snapshot_at=snapshot_at,
            listener=context.listener,
        )


def trained_model(context: Context, method: MethodSpec, seed: int) -> nn.Module:
    """The network that `run_train` left."""
    path = train_stage(context, method, seed).folder / "model.safetensors"
    tensors, _ = load_tensors(path)
    with fitting(path):
        return context.model(seed, tensors)


def learned_scores(context: Context, method: MethodSpec, seed: int) -> dict[str, Tensor]:
    """What the regularizer learned about its targets in training; mostly empty."""
    return load_tensors(train_stage(context, method, seed).folder / "scores.safetensors")[0]


def prune_stage(context: Context, method: MethodSpec, seed: int, spec: PruneSpec) -> Stage:
    """Pruning one trained network one way, at every sparsity."""
    spec = method.way(spec)
    settings = spec.model_dump(mode="json", exclude={"latency"})
    settings["code"] = criterion_code(context, spec)
    return context.store.stage("prune", {"train": train_stage(context, method, seed).key, **settings})


def run_prune(context: Context, method: MethodSpec, seed: int, spec: PruneSpec) -> list[dict[str, Any]]:
    """One row per sparsity, without the method's label."""
    stage = prune_stage(context, method, seed, spec)
    with stage.work():
        if not stage.done:
            model, learned = trained_model(context, method, seed), learned_scores(context, method, seed)
            spec = method.way(spec)
            rows = (_unit_rows if spec.granularity == "unit" else _weight_rows)(context, model, seed, spec, learned)
            stage.finish({"rows": [{**row, "stage": stage.key} for row in rows]})
        return stored_rows(stage)


def _weight_rows(
    context: Context, model: nn.Module, seed: int, spec: PruneSpec, learned: dict[str, Tensor]
) -> Iterator[dict[str, Any]]:
    ranking = weight_ranking(context, model, seed, spec, learned)
    dense = measure_cost(model, context.example(1))
    for sparsity in spec.sparsities:
        context.listener.check_stop()
        masks = ranking.masks(sparsity)
        with _borrowed_weights(model):
            masks.apply_(model)
            yield weight_row(context, model, masks, dense, spec, sparsity)


def _unit_rows(
    context: Context, model: nn.Module, seed: int, spec: PruneSpec, learned: dict[str, Tensor]
) -> Iterator[dict[str, Any]]:
    ranking = unit_ranking(context, model, seed, spec, learned)
    dense = measure_cost(model, context.example(1))
    for sparsity in spec.sparsities:
        context.listener.check_stop()
        yield unit_row(context, model, ranking.groups, ranking.kept(sparsity), dense, spec, sparsity)


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
            spec = method.way(spec)
            ranking = unit_ranking(context, model, seed, spec, learned_scores(context, method, seed))
            cut = {str(s): cut_copy(context, model, ranking.groups, ranking.kept(s))[0] for s in spec.sparsities}
            batch = min(64, len(context.data.test_labels))
            times = measure_latency(cut, context.example(batch), batch_size=batch, rounds=15, min_time=0.005)
            stage.finish({"latency": {name: latency_json(t) for name, t in times.items()}})
        return {float(name): t for name, t in stage.result(latency=dict)["latency"].items()}


def latency_json(latency: Latency) -> dict[str, Any]:
    """A latency as results store it."""
    wanted = ("median_ms", "low_ms", "high_ms", "n", "batch_size", "threads", "device")
    return {key: getattr(latency, key) for key in wanted}
