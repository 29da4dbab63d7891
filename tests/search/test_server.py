"""A study on a database server: found missing before anything is trained; shared by workers where there is one.

`SECATEUR_TEST_DATABASE=postgresql://user:password@host/database pytest tests/search/test_server.py` runs the rest, in
a study of its own in that database.
"""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
import uuid
from contextlib import closing
from pathlib import Path

import pytest

import secateur
from secateur.errors import CheckpointError, MissingExtraError, StorageError, UsageError
from secateur.lab.context import Options
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.explore.run import explore
from secateur.search import STOCHASTIC_PRUNING, SearchSpec, run_search

pytest.importorskip("optuna")

SERVER = os.environ.get("SECATEUR_TEST_DATABASE")
OBJECTIVES = (("a", "maximize"), ("b", "minimize"))
WORKER = """
import sys, time
from secateur.search import *
def objective(numbers):
    print("at", flush=True)
    time.sleep(float(sys.argv[3]))
    return {"a": numbers["sparsity"], "b": numbers["sigma"]}
spec = SearchSpec((("a", "maximize"), ("b", "minimize")), 12, population=4)
print("done", len(run_search(spec, STOCHASTIC_PRUNING, objective, sys.argv[1], sys.argv[2]).trials), flush=True)
"""


def _worker(study, seconds):
    environment = os.environ | {"PYTHONPATH": str(Path(secateur.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, SERVER, study, str(seconds)], env=environment, stdout=subprocess.PIPE, text=True
    )


def _search(study, trials=12, **changes):
    spec = SearchSpec(OBJECTIVES, trials, population=4, **changes)
    return run_search(spec, STOCHASTIC_PRUNING, lambda n: {"a": n["sparsity"], "b": n["sigma"]}, SERVER, study)


def _exploration(storage):
    section = {"kind": "search", "trials": 2, "storage": storage}
    return ExploreRecipe.model_validate({"name": "s", "train": {"duration": "1it"}, "explore": [section]})


@pytest.mark.parametrize(
    ("url", "error", "said"),
    [
        ("mssql+nosuchdriver://me:secret@localhost/db", UsageError, "nosuchdriver; expected a file, or a server"),
        (
            "mysql+aiomysql://me:secret@localhost/db",
            MissingExtraError,
            "the Python module aiomysql is not there; install",
        ),
        ("nosuch://me:secret@localhost/db", UsageError, "nosuch; expected a file, or a server"),
    ],
)
def test_a_server_nobody_can_talk_to_is_told_before_training(tmp_path, url, error, said):
    with pytest.raises(error, match=said) as caught:
        explore(_exploration(url), Options(tmp_path, device="cpu"))
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("stages/train-*"))


def test_a_database_of_something_else_is_left_alone(tmp_path):
    file = tmp_path / "books.sqlite"
    with closing(sqlite3.connect(file)) as base:
        base.execute("create table loans (book text)")
        base.commit()
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"a database of something else \(loans\); use another file"):
        explore(_exploration(str(file)), Options(tmp_path / "out", device="cpu"))
    assert file.read_bytes() == before
    assert not (tmp_path / "out").exists(), "what cannot work leaves no folder"


@pytest.mark.parametrize("content", [b"something else entirely", b""])
def test_a_storage_that_is_something_else_is_told_before_training(tmp_path, content):
    file = tmp_path / "weights.bin"
    file.write_bytes(content)
    if content:
        with pytest.raises(CheckpointError, match="neither a SQLite file nor a journal"):
            explore(_exploration(str(file)), Options(tmp_path / "out", device="cpu"))
        assert not list(tmp_path.glob("out/stages/train-*"))
    else:
        assert len(explore(_exploration(str(file)), Options(tmp_path / "out", device="cpu"))["sections"]) == 1


@pytest.mark.skipif(SERVER is None, reason="needs SECATEUR_TEST_DATABASE, the URL of a database")
class TestServer:
    def test_workers_share_the_trials_and_one_that_is_killed_loses_none(self):
        study = uuid.uuid4().hex
        doomed = _worker(study, 60)
        assert doomed.stdout.readline() == "at\n"
        doomed.kill()
        doomed.wait()
        workers = [_worker(study, 0.2) for _ in range(2)]
        said = [worker.communicate(timeout=200)[0].split("\n") for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0]
        assert sum(lines.count("at") for lines in said) == 12
        assert all("done 12" in lines for lines in said)
        assert [t.trial for t in _search(study).trials] == list(range(12))

    def test_it_is_gone_on_with_and_another_recipe_is_refused(self):
        study = uuid.uuid4().hex
        few, more = _search(study, 4), _search(study, 9)
        assert [t.numbers for t in more.trials[:4]] == [t.numbers for t in few.trials]
        assert len(more.trials) == 9
        with pytest.raises(CheckpointError, match=r"differs in seed \(0 there, 3 asked for\)") as caught:
            _search(study, seed=3)
        assert SERVER not in str(caught.value)

    def test_where_no_server_listens(self, tmp_path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url = f"{SERVER.partition('://')[0]}://me:secret@127.0.0.1:{port}/db"
        with pytest.raises(StorageError) as caught:
            explore(_exploration(url), Options(tmp_path, device="cpu"))
        assert "secret" not in str(caught.value)
        assert not list(tmp_path.glob("stages/train-*"))
