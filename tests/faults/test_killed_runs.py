"""Runs that lose their process (SIGKILL) or are asked to stop (SIGINT, SIGTERM) end as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file

RECIPE = """\
name: killed
seeds: [3]
data: {name: digits, subset: 150, validation: 0.1}
model: {name: digits_cnn, kwargs: {widths: [8, 8, 8]}}
train:
  duration: 2ep
  batch_size: 32
  augment: crop_flip
  optimizer: {name: adamw, lr: 0.01}
  checkpoint_every: 3it
methods:
  - {label: weights, regularizer: {name: targeted_dropout, gamma: 0.5, alpha: 0.5, ramp: true}}
  - {label: channels, regularizer: {name: ddrop, schedule: cosine}}
prune:
  - {granularity: weight, sparsities: [0.0, 0.6]}
  - {granularity: unit, sparsities: [0.5], criterion: taylor, recalibrate: true}
"""
FINAL = """\
final:
  method: channels
  prune: 1
  align: 1
  fine_tune: {duration: 6it, batch_size: 32, checkpoint_every: 2it, augment: crop_flip}
"""

# Children are forked from a server that has imported torch once; nothing has run in it, so each is like new.
_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(["secateur.lab.run", "secateur.cli.main", "lightning_fabric", "sklearn.datasets"])


def child(target: Callable[..., None], *arguments: object) -> int:
    """Exit code of `target(*arguments)` in its own process; negative: the signal that ended it."""
    process = _FORK.Process(target=target, args=arguments)
    process.start()
    process.join(240)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(recipe: Path, out: Path, point: str) -> None:
    """Run `recipe`; end this process by SIGKILL at `point` ("" = never)."""
    import torch

    from secateur.lab.context import Options
    from secateur.lab.listener import Listener
    from secateur.lab.recipe_file import load_recipe
    from secateur.lab.run import run_recipe

    what, _, number = point.partition(":")
    left = [int(number or 1)]

    def count() -> None:
        left[0] -= 1
        if not left[0]:
            die()

    class Deadly(Listener):
        title = ""

        def stage_started(self, title: str, steps: int) -> None:
            self.title = title

        def advanced(self, step: int, note: str) -> None:
            if what == ("fine-tune" if self.title.startswith("deliver") else "step"):
                count()

        def stage_finished(self, title: str, cached: bool) -> None:
            if what and title.startswith(what):
                count()

    replace = os.replace

    def deadly_replace(source: Path, target: Path) -> None:
        if what == f"before {Path(target).name}":
            count()  # everything is written, only the name is missing
        replace(source, target)
        if what == f"after {Path(target).name}":
            count()

    def half(descriptor: int) -> None:
        if what == "half" and "checkpoint" in os.readlink(f"/proc/self/fd/{descriptor}"):
            if left[0] == 1:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            count()

    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("os.replace", deadly_replace))
        stack.enter_context(mock.patch("os.fsync", half))
        stack.enter_context(mock.patch("secateur.lab.run.write_report"))
        stack.enter_context(mock.patch("secateur.lab.final._measurements", return_value={}))  # only clock and memory
        run_recipe(load_recipe(recipe), Options(out=out, device="cpu"), Deadly())


def products(out: Path) -> dict[str, object]:
    """Everything a run makes that does not depend on the clock."""
    (path,) = out.glob("*/result.json")
    result = json.loads(path.read_text())
    found: dict[str, object] = {"rows": result["rows"]}
    found["trainings"] = [{k: v for k, v in t.items() if k != "seconds"} for t in result["trainings"]]
    if result["final"] is not None:
        found["final"] = {k: result["final"][k] for k in ("method", "verify", "accuracy", "asked_vs_achieved")}
    for file in sorted(out.glob("stages/*/*")):
        if file.name == "pruned.safetensors":
            tensors = load_file(file)
            found[f"{file.parent.name}/{file.name}"] = {name: t.numpy().tobytes() for name, t in tensors.items()}
        elif file.name in ("model.safetensors", "metrics.jsonl"):
            found[f"{file.parent.name}/{file.name}"] = file.read_bytes()
    return found


def leftovers(out: Path) -> list[Path]:
    return [p for p in out.rglob(".*") if p.name != ".lock"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "killed.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> dict[str, object]:
    out = tmp_path_factory.mktemp("whole")
    assert child(run, recipe, out, "") == 0
    return products(out)


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(["step:2", "step:5", "step:4"], id="while training, three times"),
        pytest.param(["half:1", "half:2"], id="half way through writing a checkpoint"),
        pytest.param(["before checkpoint.safetensors:2"], id="before a checkpoint gets its name"),
        pytest.param(["after model.safetensors"], id="after the weights, before the result"),
        pytest.param(["train", "prune by weight:2"], id="between stages"),
        pytest.param(["before result.json:2", "before result.json:3"], id="before results get their names"),
    ],
)
def test_a_killed_run_run_again_is_the_uninterrupted_one(recipe, whole, tmp_path, points):
    for point in points:
        assert child(run, recipe, tmp_path, point) == -signal.SIGKILL, f"never came to {point}"
    assert child(run, recipe, tmp_path, "") == 0
    assert products(tmp_path) == whole
    assert not leftovers(tmp_path / "stages")


def test_a_kill_during_the_final_fine_tune(tmp_path):
    recipe = tmp_path / "final.yaml"
    recipe.write_text(RECIPE + FINAL)
    assert child(run, recipe, tmp_path / "whole", "") == 0
    assert child(run, recipe, tmp_path / "parts", "fine-tune:3") == -signal.SIGKILL
    (stage,) = tmp_path.glob("parts/stages/final-*")
    assert (stage / "checkpoint.safetensors").is_file()
    assert child(run, recipe, tmp_path / "parts", "before pruned.safetensors") == -signal.SIGKILL
    assert child(run, recipe, tmp_path / "parts", "") == 0
    parts, whole = products(tmp_path / "parts"), products(tmp_path / "whole")
    assert parts == whole
    assert any(name.startswith("final-") and name.endswith("pruned.safetensors") for name in whole)


def command(arguments: list[str], errors: Path) -> None:
    """The command line, its stderr in a file."""
    from secateur.cli import main

    # stdout and stderr of this process, not only Python's: the signal handler writes to the descriptor.
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = ["secateur", *arguments]
    with mock.patch("secateur.lab.run.write_report"):
        main()


def start(arguments: list[object], errors: Path):  # type: ignore[no-untyped-def]
    process = _FORK.Process(target=command, args=([str(a) for a in arguments], errors))
    process.start()
    return process


def wait_for(condition: Callable[[], bool], process) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "never came so far"
        assert process.is_alive(), "ended before it could be stopped"
        time.sleep(0.005)


LONG = ("train.duration=12ep", "methods=[{label: a}]", "prune=[{sparsities: [0.5]}]")


def stopped(recipe: Path, out: Path, name: str) -> tuple[object, Path]:
    """A started run of many steps, and where its stderr goes."""
    errors = out.parent / f"{out.name}-{name}.txt"
    options = [x for s in LONG for x in ("--set", s)]
    return start(["run", recipe, *options, "--threads", 1, "--device", "cpu", "-q", "--out", out], errors), errors


def test_a_polite_stop_exits_130_in_one_line_and_resumes(recipe, tmp_path):
    whole, errors = stopped(recipe, tmp_path / "whole", "only")
    whole.join(60)
    assert whole.exitcode == 0, errors.read_text()
    for number in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / signal.Signals(number).name
        process, errors = stopped(recipe, out, "first")
        wait_for(lambda out=out: any(out.glob("stages/train-*/checkpoint.safetensors")), process)
        os.kill(process.pid, number)
        process.join(60)
        said = errors.read_text()
        assert process.exitcode == 130, said
        assert re.search(r"secateur: interrupted at step \d+ of 60; saved, run again to continue\n$", said)
        assert "Traceback" not in said
        process, errors = stopped(recipe, out, "second")
        process.join(60)
        assert process.exitcode == 0, errors.read_text()
        assert products(out) == products(tmp_path / "whole")


def test_ctrl_c_in_the_demo_leaves_a_resumable_run(tmp_path):
    small = ["seeds=[0]", "data.subset=300", "train.duration=3ep", "final=null"]
    small += ["prune.0.sparsities=[0.5]", "prune.1.sparsities=[0.5]", "prune.1.latency=false"]
    options = ["demo", *(x for s in small for x in ("--set", s)), "--threads", 1, "--out", tmp_path / "runs"]
    process = start(options, tmp_path / "first.txt")
    wait_for(lambda: len([*tmp_path.glob("runs/stages/train-*/result.json")]) >= 2, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130, (tmp_path / "first.txt").read_text()
    process = start(options, tmp_path / "second.txt")
    process.join(120)
    said = (tmp_path / "second.txt").read_text()
    assert process.exitcode == 0, said
    assert said.count("kept  train") >= 2
    assert len([*tmp_path.glob("runs/demo-*/result.json")]) == 1


def test_two_runs_that_share_stages_at_the_same_time(recipe, tmp_path):
    """Two recipes with one training in common: one trains it, the other waits and takes it."""
    methods = "methods=[{label: %s}]"
    options = ["run", recipe, "--threads", 1, "--device", "cpu", "--out", tmp_path / "runs", "--set", "name=%s"]
    processes = []
    for name in ("first", "second"):
        own = [str(o).replace("%s", name) for o in options]
        processes.append(start([*own, "--set", methods % name], tmp_path / f"{name}.txt"))
    for process in processes:
        process.join(120)
    said = {name: (tmp_path / f"{name}.txt").read_text() for name in ("first", "second")}
    assert [p.exitcode for p in processes] == [0, 0], said
    assert len([*tmp_path.glob("runs/stages/train-*")]) == 1
    rows = [json.loads(p.read_text())["rows"] for p in sorted(tmp_path.glob("runs/*/result.json"))]
    for row in [*rows[0], *rows[1]]:
        del row["method"]
    assert rows[0] == rows[1]


def hold(folder: Path, held, done) -> None:  # type: ignore[no-untyped-def]
    from secateur.lab.store import locked

    with locked(folder, wait=0):
        held.set()
        done.wait(60)


def test_a_run_directory_in_use_is_said_in_one_line_and_left_alone(recipe, tmp_path, secateur):
    plan = secateur("run", recipe, "--out", tmp_path, "--dry-run", "--json")
    assert plan.code == 0, plan.err
    folder = Path(plan.json["folder"])
    assert not folder.exists(), "a dry run writes nothing"
    held, done = _FORK.Event(), _FORK.Event()
    process = _FORK.Process(target=hold, args=(folder, held, done))
    process.start()
    try:
        assert held.wait(60)
        before = sorted(tmp_path.rglob("*"))
        answer = secateur("run", recipe, "--out", tmp_path, "-q")
        assert answer.code == 1
        assert answer.err == f"secateur: {folder} is in use by another process; wait for it, or choose another --out\n"
        assert sorted(tmp_path.rglob("*")) == before
    finally:
        done.set()
        process.join(60)
