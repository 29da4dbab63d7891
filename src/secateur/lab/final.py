"""The network to deliver: cut, prove, fine-tune, save, reload in a fresh process, export, measure."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.analysis.cost import measure_cost
from secateur.analysis.latency import latency_ratio, measure_latency
from secateur.analysis.memory import peak_memory
from secateur.core.masks import Masks
from secateur.errors import CheckpointError
from secateur.lab.context import Context
from secateur.lab.plugins import make_regularizer
from secateur.lab.recipe import FinalSpec, MethodSpec
from secateur.lab.rows import recalibrate_
from secateur.lab.stages import criterion_code, latency_json, learned_scores, train_stage, trained_model
from secateur.lab.store import Stage
from secateur.lab.train import train
from secateur.lab.ways import unit_ranking
from secateur.surgery.file import load_pruned, save_pruned
from secateur.surgery.plan import Plan, align, make_plan
from secateur.surgery.verify import cut_verified_, max_difference

__all__ = ["choose_method", "final_stage", "run_final", "save_and_reload"]

_PROOF_INPUTS = 64


def choose_method(context: Context, spec: FinalSpec, rows: list[dict[str, Any]]) -> tuple[MethodSpec, str]:
    """The method to deliver and how it was chosen: by name, or the best mean accuracy at the nearest sparsity.

    Validation accuracy decides where the recipe holds a validation share out; otherwise test accuracy, and the
    returned words say so.
    """
    recipe = context.recipe
    methods = {m.label: m for m in recipe.methods if m.loop is None and spec.prune in dict(recipe.ways(m))}
    if spec.method != "best":
        return methods[spec.method], "named by the recipe"
    prune = context.recipe.prune[spec.prune]
    nearest = min(prune.sparsities, key=lambda s: (abs(s - spec.sparsity), s))
    by = "validation_top1" if len(context.data.validation_labels) else "top1"
    own = [r for r in rows if r["prune"] == spec.prune and r["sparsity_asked"] == nearest]
    mean = {label: sum(r[by] for r in own if r["method"] == label) / len(context.recipe.seeds) for label in methods}
    best = max(mean, key=lambda label: mean[label])
    what = "validation" if by == "validation_top1" else "test (no validation share: expect some optimism)"
    return methods[best], f"highest mean {what} accuracy at sparsity {nearest:g}"


def final_stage(context: Context, method: MethodSpec, seed: int, spec: FinalSpec) -> Stage:
    settings = spec.model_dump(mode="json", exclude={"method"})
    way = method.way(context.recipe.prune[spec.prune])
    settings["prune"] = way.model_dump(mode="json", exclude={"sparsities", "latency", "label"})
    settings["code"] = criterion_code(context, way)
    return context.store.stage("final", {"train": train_stage(context, method, seed).key, **settings})


def run_final(context: Context, method: MethodSpec, seed: int, spec: FinalSpec) -> dict[str, Any]:
    stage = final_stage(context, method, seed, spec)
    with stage.work():
        if not stage.done:
            stage.finish(_deliver(context, method, seed, spec, stage.folder))
        return stage.result(seed=int, verify=dict, accuracy=dict, file=dict)


def _deliver(context: Context, method: MethodSpec, seed: int, spec: FinalSpec, folder: Path) -> dict[str, Any]:
    dense = trained_model(context, method, seed)
    model = copy.deepcopy(dense)
    plan, got = _plan(context, method, model, seed, spec)
    masked = copy.deepcopy(dense)
    Masks(plan.masks(masked)).apply_(masked)
    proof = cut_verified_(model, plan, context.example(_PROOF_INPUTS))
    accuracy = {"dense": context.test(dense).top1, "masked": context.test(masked).top1}
    if context.recipe.prune[spec.prune].recalibrate:
        # The rows that chose this network were recalibrated too.
        recalibrate_(model, context)
    accuracy["cut"] = context.test(model).top1
    if spec.fine_tune is not None:
        train(
            model,
            context.loader(spec.fine_tune, seed),
            spec.fine_tune,
            runtime=context.runtime,
            regularizer=make_regularizer({"name": "none"}),
            folder=folder,
            seed=seed,
            evaluation=lambda m: context.validate(m) or context.test(m),
            listener=context.listener,
        )
        accuracy["fine_tuned"] = context.test(model).top1
    extra = {"data": context.data.name, "recipe": context.recipe.name, "recipe_hash": context.recipe.hash}
    file, reloaded = save_and_reload(context, model, plan, folder, extra=extra)
    accuracy["reloaded"] = context.test(reloaded).top1
    return {
        "seed": seed,
        "granularity": "unit",
        "sparsity": spec.sparsity,
        "align": spec.align,
        "asked_vs_achieved": _achieved(context, dense, model, spec, got),
        "verify": {
            "max_abs_diff": proof.max_abs_diff,
            "tolerance": proof.tolerance,
            "scale": proof.scale,
            "inputs": _PROOF_INPUTS,
        },
        "accuracy": accuracy,
        "file": file,
        "exports": _exports(context, model, spec, folder),
        **_measurements(context, dense, model, spec),
    }


def _plan(context: Context, method: MethodSpec, model: nn.Module, seed: int, spec: FinalSpec) -> tuple[Plan, float]:
    """What to cut, rounded up to whole multiples of `align`; and the sparsity of units that leaves."""
    way = method.way(context.recipe.prune[spec.prune])
    ranking = unit_ranking(context, model, seed, way, learned_scores(context, method, seed))
    kept: dict[str, Tensor] = {}
    for name, keep in ranking.kept(spec.sparsity).items():
        kept[name] = align(keep, ranking.scores[name], spec.align, blocks=ranking.groups[name].blocks)
    removed = sum(int((~k).sum()) for k in kept.values())
    return make_plan(model, ranking.groups, kept), removed / sum(k.numel() for k in kept.values())


def _achieved(context: Context, dense: nn.Module, model: nn.Module, spec: FinalSpec, got: float) -> dict[str, Any]:
    before, after = (measure_cost(m, context.example(1)) for m in (dense, model))
    pairs = {
        name: {"dense": getattr(before, name), "cut": getattr(after, name)} for name in ("params", "macs", "bytes")
    }
    return {"sparsity_asked": spec.sparsity, "sparsity_got": got, **pairs}


def save_and_reload(
    context: Context,
    model: nn.Module,
    plan: Plan | Sequence[Plan],
    folder: Path,
    *,
    extra: Mapping[str, Any],
    sparse: bool = False,
) -> tuple[dict[str, Any], nn.Module]:
    """Save the network in `folder` and rebuild it in a fresh process and in this one.

    Returns: where it is, its bytes and the largest differences; and the network that was rebuilt here.

    Raises: `CheckpointError` if it does not reload.
    """
    builder, kwargs = context.builder
    path = folder / "pruned.safetensors"
    example = context.example(1)
    save_pruned(path, model, builder=builder, kwargs=kwargs, plan=plan, inputs=example, extra=extra, sparse=sparse)
    # A fresh process knows nothing of this one: it must rebuild the network from the file alone.
    command = [sys.executable, "-m", "secateur", "verify", str(path), "--json"]
    command += [f"--allow-code={module}" for module in context.options.allow_code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"}, check=False)
    if done.returncode != 0:
        raise CheckpointError(f"{path} does not reload in a fresh process: {done.stderr.strip().splitlines()[-1:]}")
    reloaded = load_pruned(path, allow_code=context.options.allow_code).to(context.runtime.device)
    difference = max_difference(model, reloaded, context.example(_PROOF_INPUTS))
    fresh = json.loads(done.stdout)["max_abs_diff"]
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "reload_max_abs_diff": fresh,
        "same_process_max_abs_diff": difference,
    }, reloaded


def _exports(context: Context, model: nn.Module, spec: FinalSpec, folder: Path) -> list[dict[str, Any]]:
    from secateur.lab.export import export_onnx, export_torch

    example = context.example(_PROOF_INPUTS)
    reports = []
    for name in spec.exports:
        context.listener.message(f"exporting {name}")
        if name == "onnx":
            report = export_onnx(model, example, folder / "pruned.onnx")
        else:
            report = export_torch(model, example, folder / "pruned.pt2")
        reports.append(
            {
                "format": report.format,
                "path": str(report.path),
                "bytes": report.bytes,
                "max_abs_diff": report.max_abs_diff,
                "tolerance": report.tolerance,
            }
        )
    return reports


def _measurements(context: Context, dense: nn.Module, model: nn.Module, spec: FinalSpec) -> dict[str, Any]:
    batch = min(spec.batch_size, len(context.data.test_labels))
    example = context.example(batch)
    times = measure_latency({"dense": dense, "cut": model}, example, batch_size=batch, rounds=25)
    ratio = latency_ratio(times["dense"], times["cut"])
    return {
        "latency": {
            **{name: latency_json(t) for name, t in times.items()},
            "ratio": {"median": ratio.median, "low": ratio.low, "high": ratio.high, "resolved": ratio.resolved},
        },
        "memory": {
            "dense_peak_bytes": peak_memory(dense, example).peak_bytes,
            "cut_peak_bytes": peak_memory(model, example).peak_bytes,
        },
    }
