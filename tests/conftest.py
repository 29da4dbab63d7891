"""What tests of several rooms share: a recipe of seconds, the command line in this process, one finished run."""

from __future__ import annotations

import io
import json
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

TINY = """\
name: tiny
seeds: [0, 1]
data: {name: digits, subset: 200, validation: 0.1}
model: {name: digits_cnn, kwargs: {widths: [8, 8, 8]}}
train: {duration: 2ep, batch_size: 50, checkpoint_every: 3it}
methods:
  - label: plain
  - label: units
    regularizer: {name: targeted_dropout, granularity: unit, gamma: 0.5, alpha: 0.5}
    exclude: ["@last"]
prune:
  - {granularity: weight, sparsities: [0.0, 0.5]}
  - {granularity: unit, sparsities: [0.0, 0.5]}
final: {method: plain, prune: 1, sparsity: 0.5, align: 1, fine_tune: {duration: 4it, batch_size: 50}}
"""


@dataclass(frozen=True)
class Answer:
    """What one command said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The one JSON object on stdout; fails if there is anything else."""
        return json.loads(self.out)


def ask(*arguments: object) -> Answer:
    """Run `secateur ARGUMENTS` in this process."""
    from secateur.cli import main

    out, err = io.StringIO(), io.StringIO()
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    code: object = 0
    with mock.patch.object(sys, "argv", ["secateur", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    return Answer(int(code or 0), out.getvalue(), err.getvalue())  # type: ignore[call-overload]


@pytest.fixture(scope="session")
def secateur() -> Callable[..., Answer]:
    return ask


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The tiny recipe, to change freely."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@dataclass(frozen=True)
class Finished:
    """A finished run of the tiny recipe; tests read it and change nothing."""

    recipe: Path
    out: Path
    answer: Answer

    @property
    def result(self) -> dict:
        return self.answer.json

    @property
    def folder(self) -> Path:
        return Path(self.result["folder"])

    @property
    def pruned(self) -> Path:
        return Path(self.result["final"]["file"]["path"])


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("finished")
    recipe = root / "tiny.yaml"
    recipe.write_text(TINY)
    answer = ask("run", recipe, "--out", root / "runs", "--threads", 1, "--json")
    assert answer.code == 0, answer.err
    return Finished(recipe, root / "runs", answer)
