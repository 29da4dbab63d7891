"""A recipe from start to report: every stage that is not done yet, then one result."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from secateur.analysis.latency import device_name
from secateur.core.duration import Duration
from secateur.errors import CheckpointError, MissingExtraError, SecateurError, StorageError, UsageError
from secateur.lab.context import Context, Options
from secateur.lab.explore.run import check_exploration
from secateur.lab.final import choose_method, final_stage, run_final
from secateur.lab.listener import Interrupted, Listener
from secateur.lab.loop import loop_stage, run_loop
from secateur.lab.provenance import provenance
from secateur.lab.recipe import MethodSpec, PruneSpec, Recipe
from secateur.lab.recipe_file import write_recipe
from secateur.lab.report import write_report
from secateur.lab.report.schema import read_result
from secateur.lab.rows import stored_rows
from secateur.lab.stages import latency_stage, prune_stage, run_latency, run_prune, run_train, train_stage
from secateur.lab.store import Planned, Stage, locked, read_json, write_json

__all__ = ["Planned", "list_runs", "plan_run", "read_run", "run_folder", "run_recipe"]


def run_folder(recipe: Recipe, options: Options) -> Path:
    """Where a recipe's results go: the same recipe, the same folder."""
    return options.out / f"{recipe.name}-{recipe.hash}"


def plan_run(recipe: Recipe, options: Options) -> list[Planned]:
    """The stages a run would go through, without doing any (data are read, nothing is written)."""
    context = Context(recipe, options)
    context.check_model()
    planned = [Planned(title, stage.key, stage.done) for title, stage in _stages(context)]
    if recipe.final is None:
        return planned
    if not all(stage.done for stage in planned):
        return [*planned, Planned("deliver one network (which, the rows decide)", "-", False)]
    method, _ = choose_method(context, recipe.final, _kept_rows(context))
    stage = final_stage(context, method, recipe.seeds[0], recipe.final)
    return [*planned, Planned(f"deliver {method.label}", stage.key, stage.done)]


def run_recipe(recipe: Recipe, options: Options, listener: Listener | None = None) -> dict[str, Any]:
    """Run a recipe, resuming whatever an earlier run left, and write result and report.

    Returns: the result, as stored in `result.json`, with `"folder"` added.

    Raises: `BusyError` if another process runs the same recipe in the same output folder.
    """
    listener = listener or Listener()
    folder = run_folder(recipe, options)
    started = time.perf_counter()
    with locked(folder, wait=0):
        context = Context(recipe, options, listener)
        origin = provenance(device_name(context.runtime.device), torch.get_num_threads())
        write_json(folder / "env.json", origin)
        try:
            write_recipe(recipe, folder / "recipe.yaml")
        except OSError as error:
            raise StorageError(f"cannot write {folder / 'recipe.yaml'}: {error.strerror}") from error
        _check_exports(recipe)
        context.check_model()
        # Named before any work, so that what cannot be done is said now.
        for _, stage in _stages(context):
            if not options.resume:
                stage.forget()
        trainings = _train_all(context)
        rows = _prune_all(context)
        result: dict[str, Any] = {
            "schema": 1,
            "name": recipe.name,
            "recipe_hash": recipe.hash,
            "recipe": recipe.resolved(),
            "provenance": origin,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "classes": context.data.num_classes,
            "methods": [_method(m) for m in recipe.methods],
            "trainings": trainings,
            "rows": rows,
            "final": None,
        }
        failure: SecateurError | None = None
        try:
            result["final"] = _final(context, rows)
        except Interrupted:
            raise
        except SecateurError as error:
            failure = error  # what was measured before is worth its report all the same
        result["wall_seconds"] = time.perf_counter() - started
        write_json(folder / "result.json", result)
        listener.message("writing the report")
        write_report([result], folder / "report")
        if failure is not None:
            raise failure
    return {**result, "folder": str(folder)}


def list_runs(out: Path) -> list[dict[str, Any]]:
    """Every run under an output folder: name, folder, whether it is complete, and if not, why.

    Raises: `UsageError` if there is no such folder.
    """
    if not out.is_dir():
        raise UsageError(f"{out}: no such folder; name the one given to run as --out")
    found = []
    for path in sorted(out.glob("*/recipe.yaml")):
        folder, reason = path.parent, None
        result: dict[str, Any] = {}
        try:
            result = read_run(folder)
        except CheckpointError as error:
            reason = str(error)
        found.append(
            {
                "folder": str(folder),
                "complete": bool(result),
                "created": result.get("created"),
                "wall_seconds": result.get("wall_seconds"),
                "rows": len(result.get("rows", result.get("sections", []))),
                "reason": reason,
            }
        )
    return found


def read_run(path: Path) -> dict[str, Any]:
    """The checked result of a run, from its folder or its result.json.

    Raises: `CheckpointError` that names the file, if there is none or it is damaged.
    """
    file = path / "result.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        if (path / "recipe.yaml").is_file():
            raise CheckpointError(f"{path}: not finished, it has no result.json; run the recipe again to go on")
        raise CheckpointError(f"{path}: has no result.json; expected the folder of a run (secateur runs lists them)")
    result = read_json(file, "run the recipe again")
    try:
        if isinstance(result, dict) and result.get("kind") == "exploration":
            check_exploration(result)
        else:
            read_result(result)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return dict(result)


def _check_exports(recipe: Recipe) -> None:
    """Say before training, not after it, that an export cannot be made here."""
    wanted = recipe.final is not None and "onnx" in recipe.final.exports
    if wanted and not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        raise MissingExtraError("exporting to ONNX", "onnx")


def _stages(context: Context) -> list[tuple[str, Stage]]:
    recipe = context.recipe
    found = []
    for method, seed in _columns(recipe):
        found.append((f"train {method.label}, seed {seed}", train_stage(context, method, seed)))
    for number, spec in enumerate(recipe.prune):
        for method, seed in _columns(recipe, number):
            title = f"prune[{number}] {method.label}, seed {seed}"
            found.append((title, _rows_stage(context, method, seed, spec)))
            if _timed(context, method, seed, spec):
                found.append((f"time {title}", latency_stage(context, method, seed, spec)))
    return found


def _kept_rows(context: Context) -> list[dict[str, Any]]:
    """The rows of finished prune stages, read without touching the stages."""
    return [
        {"method": method.label, "seed": seed, "prune": number, **row}
        for number, spec in enumerate(context.recipe.prune)
        for method, seed in _columns(context.recipe, number)
        for row in stored_rows(_rows_stage(context, method, seed, spec))
    ]


def _rows_stage(context: Context, method: MethodSpec, seed: int, spec: PruneSpec) -> Stage:
    return (prune_stage if method.loop is None else loop_stage)(context, method, seed, spec)


def _timed(context: Context, method: MethodSpec, seed: int, spec: PruneSpec) -> bool:
    """Whether a method's networks are cut and timed: those of a loop are not, each being a training of its own."""
    return spec.latency and method.loop is None and seed == context.recipe.seeds[0]


def _columns(recipe: Recipe, prune: int | None = None) -> list[tuple[MethodSpec, int]]:
    """Every method with every seed; only the methods that a prune entry holds for, if one is named."""
    methods = [m for m in recipe.methods if prune is None or prune in dict(recipe.ways(m))]
    return [(method, seed) for seed in recipe.seeds for method in methods]


def _method(method: MethodSpec) -> dict[str, Any]:
    name = method.regularizer["name"]
    plain = method.criterion is None and method.loop is None
    return {"label": method.label, "regularizer": name, "control": plain and name in ("none", "dropout")}


def _train_all(context: Context) -> list[dict[str, Any]]:
    trainings = []
    for method, seed in _columns(context.recipe):
        title, cached = f"train {method.label}, seed {seed}", train_stage(context, method, seed).done
        spec = context.recipe.train
        steps = Duration.parse(spec.duration).steps(context.loader(spec, seed).steps_per_epoch)
        context.listener.stage_started(title, steps)
        trained = run_train(context, method, seed)
        context.listener.stage_finished(title, cached)
        trainings.append({"method": method.label, "seed": seed, **trained})
    return trainings


def _prune_all(context: Context) -> list[dict[str, Any]]:
    rows = []
    for number, spec in enumerate(context.recipe.prune):
        for method, seed in _columns(context.recipe, number):
            context.listener.check_stop()
            title = f"prune by {spec.granularity}: {method.label}, seed {seed}"
            cached = _rows_stage(context, method, seed, spec).done
            context.listener.stage_started(title, 0)
            own = (run_prune if method.loop is None else run_loop)(context, method, seed, spec)
            latency = run_latency(context, method, seed, spec) if _timed(context, method, seed, spec) else {}
            context.listener.stage_finished(title, cached)
            for row in own:
                measured = latency.get(row["sparsity_asked"])
                rows.append({"method": method.label, "seed": seed, "prune": number, **row, "latency": measured})
    return rows


def _final(context: Context, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    spec = context.recipe.final
    if spec is None:
        return None
    method, reason = choose_method(context, spec, rows)
    title = f"deliver {method.label} at {spec.sparsity:.0%} of units"
    stage = final_stage(context, method, context.recipe.seeds[0], spec)
    if not context.options.resume:
        stage.forget()
    cached = stage.done
    context.listener.stage_started(title, 0)
    delivered = run_final(context, method, context.recipe.seeds[0], spec)
    context.listener.stage_finished(title, cached)
    return {"method": method.label, "chosen": reason, **delivered}
