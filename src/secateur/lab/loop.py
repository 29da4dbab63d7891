"""Training again after pruning, once for each sparsity or in rounds: DropNet, lottery tickets, and their controls."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.analysis.cost import measure_cost
from secateur.core.groups import Groups, unit_masks
from secateur.core.masks import Masks
from secateur.core.seeds import keyed_generator, keyed_seed
from secateur.core.targets import find_targets
from secateur.lab.checkpoint import fitting, load_tensors, save_tensors
from secateur.lab.context import Context
from secateur.lab.recipe import LoopSpec, MethodSpec, PruneSpec
from secateur.lab.rows import checked_row, small_row, stored_rows, unit_row, weight_row
from secateur.lab.stages import criterion_code, learned_scores, rewind_step, train_stage, train_under, trained_model
from secateur.lab.store import Stage
from secateur.lab.ways import masks_in_rounds, unit_ranking, weight_ranking
from secateur.sparsify.iterate import next_masks, next_units
from secateur.sparsify.ranking import Ranking
from secateur.surgery.cut import cut_
from secateur.surgery.plan import make_plan

__all__ = ["loop_stage", "run_loop"]


@dataclass(frozen=True)
class _Arm:
    """One loop of a run: everything its stages depend on but the round."""

    context: Context
    method: MethodSpec
    loop: LoopSpec
    seed: int
    way: PruneSpec


@dataclass(frozen=True)
class _State:
    """A network and what is left of it; `kept` by parameter (weights) or by group (units), None = everything."""

    model: nn.Module
    kept: Mapping[str, Tensor] | None
    learned: Mapping[str, Tensor]
    stage: Stage


def loop_stage(context: Context, method: MethodSpec, seed: int, spec: PruneSpec) -> Stage:
    """The rows of one loop."""
    assert method.loop is not None
    way = method.way(spec)
    return context.store.stage(
        "loop",
        {
            "train": train_stage(context, method, seed).key,
            "way": way.model_dump(mode="json", exclude={"latency"}),
            "code": criterion_code(context, way),
            "loop": method.loop.model_dump(mode="json"),
        },
    )


def run_loop(context: Context, method: MethodSpec, seed: int, spec: PruneSpec) -> list[dict[str, Any]]:
    """The rows of one method, seed and prune entry: the dense network first, then every network trained again.

    Every training is a stage of its own, so a loop resumes between trainings and inside one.
    """
    stage = loop_stage(context, method, seed, spec)
    with stage.work():
        if not stage.done:
            stage.finish({"rows": _rows(context, method, seed, spec)})
        return stored_rows(stage)


def _rows(context: Context, method: MethodSpec, seed: int, spec: PruneSpec) -> list[dict[str, Any]]:
    assert method.loop is not None
    arm = _Arm(context, method, method.loop, seed, method.way(spec))
    dense = _State(
        trained_model(context, method, seed),
        None,
        learned_scores(context, method, seed),
        train_stage(context, method, seed),
    )
    rows = _rounds(arm, dense) if arm.loop.fraction is not None else _each(arm, dense)
    return [{**row, "retrained": True} for row in rows]


def _each(arm: _Arm, dense: _State) -> Iterator[dict[str, Any]]:
    for sparsity in arm.way.sparsities:
        arm.context.listener.check_stop()
        again = _again(arm, dense, sparsity, 1) if sparsity else None
        # A sparsity below one cell removes nothing: there is nothing to train again for.
        yield _result(arm, again or dense, sparsity)


def _rounds(arm: _Arm, dense: _State) -> Iterator[dict[str, Any]]:
    assert arm.loop.fraction is not None
    state, number = dense, 0
    first: dict[str, Any] = {}
    while True:
        arm.context.listener.check_stop()
        # The share that was asked for; what is left after rounding to whole cells is in sparsity_got.
        row = _result(arm, state, 1.0 - (1.0 - arm.loop.fraction) ** number)
        yield row
        first = first or row
        left = 1.0 - row["sparsity_got"]
        if left <= arm.loop.until + 1e-9 or (arm.loop.kappa is not None and _below(row, first, arm.loop.kappa)):
            return
        number += 1
        following = _again(arm, state, None, number)
        if following is None:
            return
        state = following


def _below(row: Mapping[str, Any], first: Mapping[str, Any], kappa: float) -> bool:
    measure = "top1" if row["validation_top1"] is None else "validation_top1"
    return bool(row[measure] < kappa * first[measure])


def _open(arm: _Arm, kind: str, spec: Mapping[str, Any]) -> Stage:
    """A stage inside the loop; done again where the caller wants nothing kept."""
    stage = arm.context.store.stage(kind, spec)
    if not arm.context.options.resume:
        stage.forget()
    return stage


def _result(arm: _Arm, state: _State, sparsity: float) -> dict[str, Any]:
    """The row of a state, kept beside its network."""
    way = arm.way.model_dump(mode="json", exclude={"latency", "sparsities", "label"})
    stage = _open(arm, "row", {"of": state.stage.key, "way": way, "sparsity": sparsity})
    with stage.work():
        if not stage.done:
            stage.finish({**_row(arm, state, sparsity), "stage": state.stage.key})
        return {**checked_row(stage, stage.result()), "criterion": arm.way.title}


def _row(arm: _Arm, state: _State, sparsity: float) -> dict[str, Any]:
    cost = measure_cost(state.model, arm.context.example(1))
    if arm.way.granularity == "unit":
        groups = _groups(arm)
        if arm.loop.small and state.kept is not None:
            full = measure_cost(arm.context.model(arm.seed), arm.context.example(1))
            return small_row(arm.context, state.model, state.kept, full, arm.way, sparsity)
        kept = state.kept or {g.name: torch.ones(g.units, dtype=torch.bool) for g in groups}
        return unit_row(arm.context, state.model, groups, kept, cost, arm.way, sparsity)
    if state.kept is None:
        targets = find_targets(state.model, arm.way.include, arm.way.exclude).tensors(state.model)
        masks = Masks({n: torch.ones_like(p, dtype=torch.bool) for n, p in targets.items()})
    else:
        masks = Masks(state.kept)
    # A copy, because a row may re-estimate statistics, and the next round must not depend on whether it did.
    return weight_row(arm.context, copy.deepcopy(state.model), masks, cost, arm.way, sparsity)


def _groups(arm: _Arm) -> Groups:
    """The groups that the way chooses units from, whatever they score."""
    by_size = arm.way.model_copy(update={"criterion": {"name": "magnitude"}})
    return unit_ranking(arm.context, arm.context.model(arm.seed), arm.seed, by_size).groups


def _again(arm: _Arm, state: _State, sparsity: float | None, number: int) -> _State | None:
    """Prune `state`, to a sparsity or by one more round, restart, and train under the masks; None if nothing goes."""
    context, loop = arm.context, arm.loop
    stage = _open(
        arm,
        "again",
        {
            "of": state.stage.key,
            "way": arm.way.model_dump(mode="json", exclude={"latency", "sparsities", "label"}),
            "code": criterion_code(context, arm.way),
            "loop": loop.model_dump(mode="json", exclude={"until", "kappa"}),
            "sparsity": sparsity,
            "round": number,
        },
    )
    with stage.work():
        if not stage.done:
            kept = _prune(arm, state, sparsity, number)
            if sum(int(k.sum()) for k in kept.values()) == _count(state.kept, kept):
                return None
            save_tensors(stage.folder / "kept.safetensors", {n: k.to(torch.uint8) for n, k in kept.items()}, {})
            model, first_step = _restart(arm, state, number)
            masks = None if loop.small else _masks(arm, kept, model)
            if masks is None:
                model = _small(arm, kept, number)
            else:
                masks.apply_(model)
            outcome = train_under(
                context, arm.method, model, arm.seed, stage, spec=loop.train, masks=masks, first_step=first_step
            )
            save_tensors(stage.folder / "scores.safetensors", outcome.scores, {})
            save_tensors(stage.folder / "model.safetensors", model.state_dict(), {})
            stage.finish({"steps": outcome.steps, "seconds": outcome.seconds, "history": outcome.history})
            (stage.folder / "checkpoint.safetensors").unlink(missing_ok=True)
    weights = stage.folder / "model.safetensors"
    kept = {n: k.bool() for n, k in load_tensors(stage.folder / "kept.safetensors")[0].items()}
    with fitting(weights):
        model = _small(arm, kept, number) if loop.small else context.model(arm.seed)
        model.load_state_dict(load_tensors(weights)[0])
    return _State(model, kept, load_tensors(stage.folder / "scores.safetensors")[0], stage)


def _count(before: Mapping[str, Tensor] | None, now: Mapping[str, Tensor]) -> int:
    """Cells that were kept so far."""
    return sum(k.numel() if before is None else int(before[n].sum()) for n, k in now.items())


def _prune(arm: _Arm, state: _State, sparsity: float | None, number: int) -> dict[str, Tensor]:
    context, loop = arm.context, arm.loop
    model = context.model(arm.seed) if loop.score_at == "init" else state.model
    # A new draw each round: random scores must not name the same units again.
    seed = keyed_seed(arm.seed, f"round {number}")
    if arm.way.granularity == "unit":
        units = unit_ranking(context, model, seed, arm.way, state.learned)
        kept = units.kept(sparsity) if sparsity else next_units(units, state.kept, _share(loop), loop.round_up)
    elif sparsity and loop.rescore > 1:
        kept = dict(masks_in_rounds(context, model, seed, arm.way, sparsity, loop.rescore))
    else:
        weights = weight_ranking(context, model, seed, arm.way, state.learned)
        before = Masks(state.kept) if state.kept is not None else None
        kept = dict(
            weights.masks(sparsity) if sparsity else next_masks(weights, before, _shares(loop, weights), loop.round_up)
        )
    if loop.shuffle_masks:
        blocks = {g.name: g.blocks for g in _groups(arm)} if arm.way.granularity == "unit" else {}
        kept = {n: _shuffled(k, blocks.get(n, 1), keyed_generator(seed, "shuffled mask", n)) for n, k in kept.items()}
    return kept


def _share(loop: LoopSpec) -> float:
    assert loop.fraction is not None
    return loop.fraction


def _shares(loop: LoopSpec, weights: Ranking) -> float | dict[str, float]:
    """What a round removes of every tensor, if the last one's share differs."""
    if loop.fraction_last is None:
        return _share(loop)
    names = list(weights.cells)
    return {name: loop.fraction_last if name == names[-1] else _share(loop) for name in names}


def _shuffled(kept: Tensor, blocks: int, generator: torch.Generator) -> Tensor:
    """The same entries in random order, inside each of `blocks` equal parts, whose counts must stay equal."""
    parts = [part[torch.randperm(len(part), generator=generator)] for part in kept.reshape(blocks, -1)]
    return torch.cat(parts).reshape(kept.shape)


def _masks(arm: _Arm, kept: Mapping[str, Tensor], model: nn.Module) -> Masks:
    return Masks(unit_masks(_groups(arm), dict(kept), model)) if arm.way.granularity == "unit" else Masks(kept)


def _small(arm: _Arm, kept: Mapping[str, Tensor], number: int) -> nn.Module:
    """A network of the kept widths, freshly initialized for the fan-in it has, not for the one it was cut from."""
    model = arm.context.model(_anew(arm, number))
    before = {t.name: t for t in find_targets(model)}
    cut_(model, make_plan(model, _groups(arm), dict(kept)))
    # Initializers draw with a deviation of 1 / sqrt(fan_in): what was drawn for the wide network is scaled.
    with torch.no_grad():
        for target in find_targets(model):
            scale = (before[target.name].fan_in / target.fan_in) ** 0.5
            for name in (target.name, target.bias):
                if name is not None:
                    model.get_parameter(name).mul_(scale)
    return model


def _anew(arm: _Arm, number: int) -> int:
    return keyed_seed(arm.seed, f"reinitialize {number}") % 2**31


def _restart(arm: _Arm, state: _State, number: int) -> tuple[nn.Module, int]:
    """The network to train again, and the step it stands at."""
    context, restart = arm.context, arm.loop.restart
    if restart == "init":
        return context.model(arm.seed), 0
    if restart == "reinitialize":
        return context.model(_anew(arm, number)), 0
    if restart == "trained":
        return context.model(arm.seed, state.model.state_dict()), 0
    step = rewind_step(context, arm.method, arm.seed)
    path = train_stage(context, arm.method, arm.seed).folder / "snapshot.safetensors"
    with fitting(path):
        return context.model(arm.seed, load_tensors(path)[0]), step or 0
