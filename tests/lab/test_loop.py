"""Training again after pruning: what is removed, where it starts again, and that it resumes bitwise."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from secateur.core.seeds import keyed_generator
from secateur.errors import RecipeError, UsageError
from secateur.lab.checkpoint import load_tensors
from secateur.lab.context import Context, Options
from secateur.lab.listener import Interrupted, Listener
from secateur.lab.loop import _shuffled
from secateur.lab.recipe_file import load_recipe
from secateur.lab.run import plan_run, run_recipe
from secateur.lab.stages import train_stage
from secateur.regularizers.gradual_pruning import GradualPruning

RECIPE = """\
name: loop
seeds: [0]
data: {{name: digits, subset: 120, validation: 0.2}}
model: {{name: mlp, kwargs: {{hidden: [10, 10]}}}}
train:
  duration: {duration}
  batch_size: 32
  optimizer: {{name: sgd, lr: {lr}, momentum: 0.9, weight_decay: 0.0}}
  lr_schedule: {{name: constant}}
methods:
  - {{label: again, regularizer: none, loop: {loop}}}
prune:
  - {prune}
"""
UNITS = "{granularity: unit, criterion: mean_activation, scope: global, ties: random}"
WEIGHTS = "{granularity: weight, criterion: magnitude, sparsities: [0.0, 0.5]}"


def _recipe(tmp_path, loop, prune=UNITS, duration="2ep", lr=0.1):
    path = tmp_path / "loop.yaml"
    path.write_text(RECIPE.format(loop=loop, prune=prune, duration=duration, lr=lr))
    return load_recipe(path)


def _options(tmp_path, **more):
    return Options(out=tmp_path / "runs", device="cpu", **more)


def _run(tmp_path, loop, prune=UNITS, **more):
    recipe = _recipe(tmp_path, loop, prune, **more)
    return recipe, run_recipe(recipe, _options(tmp_path))


def _trained(tmp_path, kind="again"):
    """Networks and kept cells of the loop's own trainings, by round or sparsity."""
    found = {}
    for folder in (tmp_path / "runs" / "stages").glob(f"{kind}-*"):
        spec = json.loads((folder / "stage.json").read_text())
        weights, _ = load_tensors(folder / "model.safetensors")
        kept, _ = load_tensors(folder / "kept.safetensors")
        found[spec["sparsity"] or spec["round"]] = (weights, {n: k.bool() for n, k in kept.items()})
    return found


def _init(tmp_path, recipe):
    return Context(recipe, _options(tmp_path)).model(0).state_dict()


def test_rounds_remove_a_fraction_of_what_remains_until_little_is_left(tmp_path):
    _, result = _run(tmp_path, "{fraction: 0.5, until: 0.2}")
    rows = result["rows"]
    assert [round(row["sparsity_asked"], 6) for row in rows] == [0.0, 0.5, 0.75, 0.875]
    assert [sum(layer["kept"] for layer in row["layers"]) for row in rows] == [20, 10, 5, 3]
    assert all(row["retrained"] for row in rows)
    assert all(row["max_abs_diff"] < 1e-4 for row in rows), "what is reported is the cut network, proven"
    assert rows[0]["top1"] == result["trainings"][0]["top1"]


def test_masks_are_nested_and_held_through_training(tmp_path):
    _run(tmp_path, "{fraction: 0.5, until: 0.2}", WEIGHTS)
    found = _trained(tmp_path)
    before = None
    for number in sorted(found):
        weights, kept = found[number]
        for name, mask in kept.items():
            assert bool((weights[name][~mask] == 0).all())
            assert bool((weights[name][mask] != 0).any())
            assert before is None or bool((before[name] | ~mask).all()), "a removed weight came back"
        before = kept


def test_the_last_layer_loses_a_share_of_its_own(tmp_path):
    _, result = _run(tmp_path, "{fraction: 0.5, fraction_last: 0.25, until: 0.5}", WEIGHTS)
    *others, last = result["rows"][1]["layers"]
    assert all(layer["kept"] == layer["total"] - layer["total"] // 2 for layer in others)
    assert last["kept"] == last["total"] - last["total"] // 4


# A learning rate of next to nothing shows where a training started.
@pytest.mark.parametrize("restart", ["init", "reinitialize", "trained", "1ep"])
def test_where_training_starts_again(tmp_path, restart):
    recipe = _recipe(tmp_path, f"{{restart: {restart}}}", WEIGHTS)
    run_recipe(recipe, _options(tmp_path))
    stage = train_stage(Context(recipe, _options(tmp_path)), recipe.methods[0], 0)
    trained, _ = load_tensors(stage.folder / "model.safetensors")
    starts = {"init": _init(tmp_path, recipe), "trained": trained}
    if restart == "1ep":
        starts["1ep"], _ = load_tensors(stage.folder / "snapshot.safetensors")
        assert not torch.equal(starts["1ep"]["fc1.weight"], trained["fc1.weight"])
    slow = _recipe(tmp_path, f"{{restart: {restart}}}", WEIGHTS, lr=1e-12)
    context = Context(slow, _options(tmp_path))
    # The dense network stays that of the quick recipe: only the second training is slow.
    for name in ("model", "scores", "snapshot"):
        source = stage.folder / f"{name}.safetensors"
        if source.is_file():
            target = train_stage(context, slow.methods[0], 0).folder
            target.mkdir(parents=True, exist_ok=True)
            (target / source.name).write_bytes(source.read_bytes())
    done = train_stage(context, slow.methods[0], 0)
    done.finish(stage.result())
    for folder in (tmp_path / "runs" / "stages").glob("again-*"):
        (folder / "result.json").unlink()
        (folder / "stage.json").write_text('{"sparsity": null, "round": -1}')
    run_recipe(slow, _options(tmp_path))
    weights, kept = _trained(tmp_path)[0.5]
    for name, mask in kept.items():
        if restart == "reinitialize":
            assert not torch.allclose(weights[name][mask], starts["init"][name][mask], atol=1e-3)
        else:
            torch.testing.assert_close(weights[name], starts[restart][name] * mask, atol=1e-6, rtol=0)


def test_scoring_before_training_prunes_the_untrained_network(tmp_path):
    recipe, _ = _run(tmp_path, "{score_at: init}", WEIGHTS)
    start = _init(tmp_path, recipe)
    _, kept = _trained(tmp_path)[0.5]
    for name, mask in kept.items():
        size = start[name].abs()
        assert float(size[~mask].max()) <= float(size[mask].min())


def test_shuffled_masks_keep_the_counts_and_nothing_else(tmp_path):
    recipe, _ = _run(tmp_path, "{shuffle_masks: true}", WEIGHTS)
    stage = train_stage(Context(recipe, _options(tmp_path)), recipe.methods[0], 0)
    trained, _ = load_tensors(stage.folder / "model.safetensors")
    _, kept = _trained(tmp_path)[0.5]
    for name, mask in kept.items():
        assert int(mask.sum()) == mask.numel() - mask.numel() // 2
        size = trained[name].abs()
        assert float(size[~mask].max()) > float(size[mask].min())


def test_a_small_network_from_scratch_has_the_small_shapes(tmp_path):
    prune = "{granularity: unit, criterion: random, sparsities: [0.0, 0.5]}"
    _, result = _run(tmp_path, "{score_at: init, restart: reinitialize, small: true}", prune)
    weights, _ = _trained(tmp_path)[0.5]
    assert weights["fc1.weight"].shape == (5, 64)
    assert weights["fc2.weight"].shape == (5, 5)
    row = next(r for r in result["rows"] if r["sparsity_asked"] == 0.5)
    assert row["params_kept"] == sum(w.numel() for w in weights.values())
    # Its first weights are drawn for its own fan-in: PyTorch draws from +-1 / sqrt(fan_in).
    assert float(weights["fc2.weight"].abs().max()) > 1 / 10**0.5


def test_rounds_end_when_accuracy_falls_below_its_share(tmp_path):
    _, result = _run(tmp_path, "{fraction: 0.5, until: 0.0, kappa: 1.0}", duration="8ep")
    accuracy = [row["validation_top1"] for row in result["rows"]]
    assert accuracy[-1] < accuracy[0]
    assert all(value >= accuracy[0] for value in accuracy[:-1])


class _StopAfter(Listener):
    """Asks to stop after so many training steps in all."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def advanced(self, step, note):
        self.left -= 1
        self.stop = self.left <= 0


@pytest.mark.parametrize("steps", [9, 14, 20])
def test_interrupted_anywhere_it_ends_with_the_same_weights(tmp_path, steps):
    loop = "{fraction: 0.5, until: 0.3, restart: 1ep}"
    (tmp_path / "whole").mkdir()
    _, whole = _run(tmp_path / "whole", loop, WEIGHTS, duration="3ep")
    recipe = _recipe(tmp_path, loop, WEIGHTS, duration="3ep")
    with pytest.raises(Interrupted):
        run_recipe(recipe, _options(tmp_path), _StopAfter(steps))
    resumed = run_recipe(recipe, _options(tmp_path))
    assert [row["top1"] for row in resumed["rows"]] == [row["top1"] for row in whole["rows"]]
    ours, theirs = _trained(tmp_path), _trained(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    for number, (weights, _) in ours.items():
        assert all(torch.equal(weights[n], theirs[number][0][n]) for n in weights)


def test_a_finished_loop_is_kept_and_no_resume_does_it_again(tmp_path):
    recipe, first = _run(tmp_path, "{fraction: 0.5, until: 0.3}")
    stages = tmp_path / "runs" / "stages"
    times = {p: p.stat().st_mtime_ns for p in stages.glob("*/result.json")}
    again = run_recipe(recipe, _options(tmp_path))
    assert again["rows"] == first["rows"]
    assert {p: p.stat().st_mtime_ns for p in stages.glob("*/result.json")} == times
    assert all(stage.done for stage in plan_run(recipe, _options(tmp_path)))
    fresh = run_recipe(recipe, _options(tmp_path, resume=False))
    assert fresh["rows"] == first["rows"]
    assert all(p.stat().st_mtime_ns > times[p] for p in stages.glob("again-*/result.json"))


def test_a_method_may_rank_by_its_own_criterion(tmp_path):
    path: Path = tmp_path / "own.yaml"
    path.write_text(
        RECIPE.format(loop="{restart: trained}", prune=WEIGHTS, duration="1ep", lr=0.1)
        .replace("regularizer: none, loop", "regularizer: none, criterion: random, loop")
        .replace("prune:\n", "prune:\n  - {granularity: unit, criterion: magnitude, sparsities: [0.5]}\n")
    )
    result = run_recipe(load_recipe(path), _options(tmp_path))
    assert {row["criterion"] for row in result["rows"]} == {"random"}


@pytest.mark.parametrize(
    ("loop", "words"),
    [
        ("{restart: 0.5run}", "is a fraction of the run"),
        ("{restart: sometimes}", 'duration "sometimes"'),
        ("{until: 0.2}", "give fraction too"),
        ("{fraction_last: 0.1}", "give fraction too"),
        ("{score_at: init, fraction: 0.2}", "prunes before training"),
        ("{small: true}", "takes score_at init and restart reinitialize"),
        ("{fraction: 0.2, rescore: 5}", "take no fraction"),
        ("{fraction: 0.2, shuffle_masks: true}", "take no fraction"),
        ("{restart: 1ep, train: {duration: 1ep}}", "takes no train of its own"),
        ("{rescore: 5}", "needs granularity weight"),
    ],
)
def test_loops_that_make_no_sense_are_refused(tmp_path, loop, words):
    with pytest.raises(RecipeError, match=words):
        _recipe(tmp_path, loop)


@pytest.mark.parametrize(
    ("loop", "prune", "words"),
    [
        ("{fraction: 0.2}", "{granularity: weight, scope: column}", "rounds count over tensors"),
        ("{fraction: 0.2}", "{granularity: weight, allocation: erk}", "allocation uniform"),
        ("{fraction: 0.2}", "{granularity: weight, min_keep: 0}", "min_keep 1 or more"),
        ("{fraction: 0.2, fraction_last: 0.1}", "{granularity: unit}", "fraction_last needs granularity weight"),
        ("{fraction: 0.2, fraction_last: 0.1}", "{granularity: weight, scope: global}", "and scope tensor"),
        ("{}", '{granularity: "2:4", sparsities: [0.5]}', "granularity weight or unit"),
        ("{}", "{granularity: weight, criterion: learned}", "needs a regularizer that learns"),
    ],
)
def test_prune_entries_that_a_loop_cannot_follow_are_refused(tmp_path, loop, prune, words):
    with pytest.raises(RecipeError, match=f'method "again": .*{words}'):
        _recipe(tmp_path, loop, prune)


@pytest.mark.parametrize("restart", ["0ep", "2ep", "9ep"])
def test_a_step_to_rewind_to_lies_within_the_training(tmp_path, restart):
    with pytest.raises(UsageError, match="expected a step between the first and the last"):
        _run(tmp_path, f"{{restart: {restart}}}", WEIGHTS)
    assert not list((tmp_path / "runs" / "stages").glob("train-*/result.json"))


@pytest.mark.parametrize("change", ["patience: 2", "keep: best"])
def test_the_test_set_chooses_nothing(tmp_path, change):
    path = tmp_path / "open.yaml"
    text = RECIPE.format(loop="{restart: trained}", prune=WEIGHTS, duration="2ep", lr=0.1)
    path.write_text(text.replace(", validation: 0.2", "").replace("  batch_size", f"  {change}\n  batch_size"))
    with pytest.raises(UsageError, match="chooses by held-out images"):
        run_recipe(load_recipe(path), _options(tmp_path))


def test_schedules_go_on_where_the_network_was_rewound_to(tmp_path):
    seen = []
    plain = GradualPruning.sparsity_at

    def watched(self, t):
        seen.append(round(t, 6))
        return plain(self, t)

    path = tmp_path / "rewound.yaml"
    text = RECIPE.format(loop="{restart: 1ep}", prune=WEIGHTS, duration="3ep", lr=0.1)
    path.write_text(text.replace("regularizer: none", "regularizer: {name: gradual_pruning, sparsity: 0.3}"))
    with mock.patch.object(GradualPruning, "sparsity_at", watched):
        run_recipe(load_recipe(path), _options(tmp_path))
    steps = len(set(seen))
    assert seen == [round((i + 1) / steps, 6) for i in (*range(steps), *range(steps // 3, steps))]


def test_fine_tuning_may_have_a_training_of_its_own(tmp_path):
    _run(tmp_path, "{restart: trained, train: {duration: 3it, batch_size: 32}}", WEIGHTS)
    (stage,) = (tmp_path / "runs" / "stages").glob("again-*/result.json")
    assert json.loads(stage.read_text())["steps"] == 3


def test_units_in_blocks_are_shuffled_inside_them():
    kept = torch.tensor([True, True, False, False, False, False, True, True])
    shuffled = [_shuffled(kept, 2, keyed_generator(seed, "x")) for seed in range(20)]
    assert all(s.reshape(2, -1).sum(1).tolist() == [2, 2] for s in shuffled)
    assert len({tuple(s.tolist()) for s in shuffled}) > 5


def test_a_sparsity_below_one_cell_is_the_network_itself(tmp_path):
    prune = "{granularity: unit, criterion: magnitude, sparsities: [0.05, 0.5]}"
    _, result = _run(tmp_path, "{restart: init}", prune)
    assert result["rows"][0]["top1"] == result["trainings"][0]["top1"]
    assert result["rows"][0]["sparsity_got"] == 0.0


def test_re_estimating_statistics_for_a_row_leaves_the_next_round_alone(tmp_path):
    path = tmp_path / "recalibrated.yaml"
    prune = "{granularity: weight, criterion: saliency, sparsities: [0.0, 0.5], recalibrate: true}"
    text = RECIPE.format(loop="{restart: trained}", prune=prune, duration="2ep", lr=0.1)
    path.write_text(
        text.replace("{name: mlp, kwargs: {hidden: [10, 10]}}", "{name: digits_cnn, kwargs: {widths: [4, 4, 4]}}")
    )
    recipe = load_recipe(path)
    whole = run_recipe(recipe, _options(tmp_path))
    stages = tmp_path / "runs" / "stages"
    rows = {p: json.loads(p.read_text())["sparsity_asked"] for p in stages.glob("row-*/result.json")}
    for path in [*stages.glob("loop-*/result.json"), *stages.glob("again-*/result.json")]:
        path.unlink()
    for path, sparsity in rows.items():
        if sparsity:
            path.unlink()
    again = run_recipe(recipe, _options(tmp_path))
    assert [row["top1"] for row in again["rows"]] == [row["top1"] for row in whole["rows"]]
