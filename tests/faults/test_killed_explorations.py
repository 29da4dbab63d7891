"""Explorations that lose their process (SIGKILL) go on: nothing is lost, and no trial is counted twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("optuna")

RECIPE = """\
name: killed
data: {name: digits, subset: 200}
model: {name: digits_cnn, kwargs: {widths: [4, 6, 8]}}
train: {duration: 1ep, batch_size: 50}
judge: {images: 60}
explore:
  - {kind: noise, sigmas: [0.05, 0.1], sparsities: [0.5], variants: 4, confirm: false}
  - {kind: search, trials: 7, population: 3, variants: 2, storage: STORAGE}
"""

# Children are forked from a server that has imported torch once; nothing has run in it, so each is like new.
_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(
    ["secateur.lab.explore.run", "secateur.search.storage", "lightning_fabric", "sklearn.datasets"]
)


def child(target: Callable[..., None], *arguments: object) -> int:
    """Exit code of `target(*arguments)` in its own process; negative: the signal that ended it."""
    process = _FORK.Process(target=target, args=arguments)
    process.start()
    process.join(240)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def run(recipe: Path, out: Path, point: str) -> None:
    """Explore; end this process by SIGKILL at `point` ("" = never), as in "search 3": at its third sign of life.

    "inside 3" is inside the third trial.
    """
    from unittest import mock

    import torch

    from secateur.lab.context import Options
    from secateur.lab.explore import problems
    from secateur.lab.explore.run import explore
    from secateur.lab.listener import Listener
    from secateur.lab.recipe_file import load_any

    what, _, number = point.partition(" ")
    left = [int(number or 1)]

    def count(place: str) -> None:
        if what == place:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    class Deadly(Listener):
        title = ""

        def stage_started(self, title: str, steps: int) -> None:
            self.title = title

        def advanced(self, step: int, note: str) -> None:
            count("front" if note.startswith("front") else self.title)

        def stage_finished(self, title: str, cached: bool) -> None:
            count(f"after-{title}")

    packed = problems.evaluate_variants

    def inside(*arguments, **options):  # type: ignore[no-untyped-def]
        count("inside")
        return packed(*arguments, **options)

    torch.set_num_threads(1)
    with (
        mock.patch.object(problems, "evaluate_variants", inside),
        mock.patch("secateur.lab.report.explore.render.write_exploration"),
    ):
        explore(load_any(recipe), Options(out=out, device="cpu"), Deadly())


def products(out: Path) -> list[dict[str, object]]:
    """What the sections found, without clocks, workers and folders."""
    (path,) = out.glob("*/result.json")
    noise, search = json.loads(path.read_text())["sections"]
    trials = [{k: v for k, v in t.items() if k not in ("worker", "seconds")} for t in search["trials"]]
    front = [{k: v for k, v in p.items() if k not in ("worker", "seconds")} for p in search["front"]]
    found = {k: search[k] for k in ("hypervolume", "chosen", "why", "dense")}
    accuracy = search["delivered"]["accuracy"]
    cells = {k: noise[k] for k in ("cells", "plain", "dense")}
    return [cells, {**found, "trials": trials, "front": front, "accuracy": accuracy}]


def recipe_in(folder: Path) -> Path:
    path = folder / "killed.yaml"
    path.write_text(RECIPE.replace("STORAGE", "null"))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict[str, object]]:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("whole")
    assert child(run, recipe_in(folder), folder / "out", "") == 0
    return products(folder / "out")


def test_a_killed_exploration_run_again_is_the_uninterrupted_one(whole, tmp_path):
    points = ["noise 4", "after-noise 1", "inside 3", "search 2", "front 1"]
    for point in points:
        assert child(run, recipe_in(tmp_path), tmp_path / "out", point) == -signal.SIGKILL, f"never came to {point}"
    assert child(run, recipe_in(tmp_path), tmp_path / "out", "") == 0
    assert products(tmp_path / "out") == whole
    (study,) = (tmp_path / "out").glob("stages/study-*/study-1.sqlite")
    slots = counted(study)
    assert sorted(slots) == list(range(7)), "each trial is counted once"
    (journal,) = (tmp_path / "out").glob("stages/explore-*/variants.jsonl")
    variants = [json.loads(line)["variant"] for line in journal.read_text().splitlines()[1:]]
    assert len(variants) == len(set(variants)), "nothing is evaluated twice"


def counted(study: Path) -> list[int]:
    """The slots of the trials that are complete, as the database has them."""
    with sqlite3.connect(study) as base:
        rows = base.execute(
            "select value_json from trial_user_attributes join trials using (trial_id) "
            "where key = 'slot' and state = 'COMPLETE'"
        ).fetchall()
    return [int(json.loads(row[0])) for row in rows]


def test_a_killed_worker_leaves_its_trial_to_the_others(whole, tmp_path):
    """One storage for two workers with folders of their own: one dies inside a trial, the other does them all."""
    recipe = tmp_path / "killed.yaml"
    recipe.write_text(RECIPE.replace("STORAGE", str(tmp_path / "shared.db")))
    assert child(run, recipe, tmp_path / "one", "inside 3") == -signal.SIGKILL
    assert sorted(counted(tmp_path / "shared.db")) == [0, 1]
    assert child(run, recipe, tmp_path / "two", "") == 0
    assert products(tmp_path / "two") == whole
    assert sorted(counted(tmp_path / "shared.db")) == list(range(7))
    # The one that died only reports when it is started again.
    assert child(run, recipe, tmp_path / "one", "") == 0
    assert products(tmp_path / "one") == whole
    assert sorted(counted(tmp_path / "shared.db")) == list(range(7))
