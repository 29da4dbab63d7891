"""Train once, prune many: what is done is kept, and only what changes the numbers is done again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import UsageError
from secateur.lab.context import Options
from secateur.lab.listener import Interrupted, Listener
from secateur.lab.recipe_file import load_recipe
from secateur.lab.run import list_runs, plan_run, run_recipe

SMALL = """\
name: small
seeds: [0]
data: {name: digits, subset: 120}
model: {name: mlp, kwargs: {hidden: [16]}}
train: {duration: 4it, batch_size: 32}
methods:
  - {label: plain}
  - {label: dropped, regularizer: {name: dropout, drop_rate: 0.5, granularity: unit}, exclude: ["@last"]}
prune:
  - {granularity: weight, sparsities: [0.0, 0.5]}
"""


class Watch(Listener):
    def __init__(self) -> None:
        self.done: list[str] = []
        self.kept: list[str] = []

    def stage_finished(self, title: str, cached: bool) -> None:
        (self.kept if cached else self.done).append(title)


@pytest.fixture
def run(tmp_path: Path):  # type: ignore[no-untyped-def]
    recipe = tmp_path / "small.yaml"
    recipe.write_text(SMALL)

    def call(overrides: Sequence[str] = (), **options: object) -> tuple[dict, Watch]:
        watch = Watch()
        with mock.patch("secateur.lab.run.write_report"):
            chosen = Options(out=tmp_path / "runs", device="cpu", **options)  # type: ignore[arg-type]
            return run_recipe(load_recipe(recipe, overrides, allow_code=chosen.allow_code), chosen, watch), watch

    return call


def test_the_second_time_everything_is_kept(run):
    first, watch = run()
    assert len(watch.done) == 4
    again, watch = run()
    assert not watch.done
    assert again["rows"] == first["rows"]
    assert again["trainings"] == first["trainings"]


@pytest.mark.parametrize(
    ("change", "trained", "pruned"),
    [
        ("name=other", 0, 0),
        ("methods.0.label=other name", 0, 0),
        ("prune.0.sparsities=[0.0,0.5,0.75]", 0, 2),
        ("prune=[{sparsities: [0.0, 0.5]}, {criterion: random, sparsities: [0.5]}]", 0, 2),
        ("seeds=[0,1]", 2, 2),
        ("methods.1.regularizer.drop_rate=0.25", 1, 1),
        ("train.optimizer.lr=0.05", 2, 2),
        ("data.subset=119", 2, 2),
        ("model.kwargs.hidden=[17]", 2, 2),
    ],
)
def test_only_what_depends_on_a_change_is_done_again(run, change, trained, pruned):
    run()
    _, watch = run([change])
    assert sum(title.startswith("train") for title in watch.done) == trained
    assert sum(title.startswith("prune") for title in watch.done) == pruned


def test_no_resume_does_it_again_with_the_same_numbers(run):
    first, _ = run()
    again, watch = run(resume=False)
    assert len(watch.done) == 4
    assert again["rows"] == first["rows"]


def test_the_same_training_under_two_labels_is_done_once(run):
    _, watch = run(["methods=[{label: a}, {label: b}]"])
    assert watch.done == ["train a, seed 0", "prune by weight: a, seed 0"]
    assert watch.kept == ["train b, seed 0", "prune by weight: b, seed 0"]


def test_other_bytes_in_the_data_are_another_training(tmp_path, run):
    folder = tmp_path / "data" / "mine"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 8, 8), dtype=np.uint8)
    for part, count in (("train", 60), ("test", 20)):
        np.save(folder / f"{part}_images.npy", images[:count])
        np.save(folder / f"{part}_labels.npy", np.arange(count) % 3)
    own = ["data={name: mine}"]
    run(own, data_dir=folder.parent)
    assert not run(own, data_dir=folder.parent)[1].done
    images[17, 3, 4] ^= 1
    np.save(folder / "train_images.npy", images)
    assert len(run(own, data_dir=folder.parent)[1].done) == 4


def test_asking_to_stop_between_stages(run, tmp_path):
    class Stop(Watch):
        def stage_finished(self, title: str, cached: bool) -> None:
            super().stage_finished(title, cached)
            self.stop = title.startswith("prune")

    recipe, options = load_recipe(tmp_path / "small.yaml"), Options(out=tmp_path / "runs", device="cpu")
    with pytest.raises(Interrupted, match="run the same command again"):
        run_recipe(recipe, options, Stop())
    assert [p.done for p in plan_run(recipe, options)] == [True, True, True, False]
    (listed,) = list_runs(tmp_path / "runs")
    assert not listed["complete"]
    _, watch = run()
    assert len(watch.done) == 1
    (listed,) = list_runs(tmp_path / "runs")
    assert listed["complete"]


def dropping(num_classes: int, in_shape: Sequence[int]) -> nn.Module:
    """BatchNorm after nn.Dropout, which draws from the global generator."""
    return nn.Sequential(
        nn.Dropout(0.5),
        nn.Conv2d(in_shape[0], 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(num_classes),
    )


def built(num_classes: int, in_shape: Sequence[int]) -> nn.Module:
    model = dropping(num_classes, in_shape)
    model(torch.zeros(2, *in_shape))
    return model


def test_recalibrated_rows_do_not_depend_on_the_global_generator(run):
    own = [f"model={{name: 'python:{__name__}:built'}}", "methods=[{label: a}]", "data.subset=40"]
    own.append("prune=[{granularity: unit, sparsities: [0.0, 0.5], recalibrate: true}]")
    first, _ = run(own, allow_code=(__name__,))
    torch.rand(5)
    again, _ = run(own, allow_code=(__name__,), resume=False)
    assert again["rows"] == first["rows"]
    assert again["trainings"][0]["history"] == first["trainings"][0]["history"]


def short(num_classes: int, in_shape: Sequence[int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes - 1))


def narrow(num_classes: int, in_shape: Sequence[int]) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(63, num_classes))


@pytest.mark.parametrize(
    ("name", "words"), [("short", r"\[2, 9\].*\[2, 10\]"), ("narrow", r"cannot take.*\[1, 8, 8\]")]
)
def test_a_network_that_does_not_fit_the_data_is_said_before_any_work(run, tmp_path, name, words):
    with pytest.raises(UsageError, match=words) as caught:
        run([f"model={{name: 'python:{__name__}:{name}'}}"], allow_code=(__name__,))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs" / "stages").exists()
