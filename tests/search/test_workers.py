"""Several workers on one study: no trial twice, one budget, and what a killed worker was at is done again."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import secateur
from secateur.search import STOCHASTIC_PRUNING, SearchSpec, run_search

pytest.importorskip("optuna")

PAIR = (("a", "maximize"), ("b", "minimize"))
WORKER = """
import sys, time
from secateur.search import *
path, sampler, trials, seconds, heartbeat = sys.argv[1], sys.argv[2], *map(float, sys.argv[3:6])
def objective(numbers):
    print("at", flush=True)
    time.sleep(seconds)
    return {"a": numbers["sparsity"], "b": numbers["sparsity"] ** 2 + numbers["sigma"]}
spec = SearchSpec((("a", "maximize"), ("b", "minimize")), int(trials), sampler, population=4, startup=4)
result = run_search(spec, STOCHASTIC_PRUNING, objective, path, heartbeat=heartbeat)
print("done", len(result.trials), flush=True)
"""


def start(path, sampler="nsga2", trials=12, seconds=0.0, heartbeat=10.0):
    environment = os.environ | {"PYTHONPATH": str(Path(secateur.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    arguments = [str(a) for a in (path, sampler, trials, seconds, heartbeat)]
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )


def objective(numbers):
    return {"a": numbers["sparsity"], "b": numbers["sparsity"] ** 2 + numbers["sigma"]}


def search(path, trials=12, sampler="nsga2", **rest):
    spec = SearchSpec(PAIR, trials, sampler, population=4, startup=4)
    return run_search(spec, STOCHASTIC_PRUNING, rest.pop("objective", objective), path, **rest)


@pytest.mark.parametrize(("name", "sampler"), [("study.db", "nsga2"), ("study.jsonl", "tpe"), ("study.jsonl", "grid")])
def test_two_workers_share_one_budget(tmp_path, name, sampler):
    path = tmp_path / name
    workers = [start(path, sampler, seconds=0.1) for _ in range(2)]
    said = [worker.communicate(timeout=200)[0].split("\n") for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    counts = [lines.count("at") for lines in said]
    # Every trial was run once, by one of them, and both saw all of them.
    assert sum(counts) == 12
    assert all("done 12" in lines for lines in said)
    result = search(path, sampler=sampler)
    assert sum(counts) == len(result.trials) == len({trial.trial for trial in result.trials})
    assert sorted(sum(t.worker == w for t in result.trials) for w in {t.worker for t in result.trials}) == sorted(
        count for count in counts if count
    )
    if sampler == "grid":
        assert len({tuple(trial.numbers.values()) for trial in result.trials}) == 12


@pytest.mark.parametrize("name", ["study.db", "study.jsonl"])
def test_what_a_killed_worker_was_at_is_done_again(tmp_path, name):
    path = tmp_path / name
    before = search(path, 5)
    worker = start(path, trials=12, seconds=300)
    assert worker.stdout.readline() == "at\n"
    worker.kill()
    worker.wait(timeout=30)
    began = time.monotonic()
    result = search(path)
    # At once, since the process is gone: a heartbeat is missed only after a minute.
    assert time.monotonic() - began < 50
    assert len(result.trials) == 12
    assert result.trials[:5] == before.trials
    # As if nothing had happened.
    assert [t.numbers for t in result.trials] == [t.numbers for t in search(None).trials]


def test_a_worker_that_shows_no_sign_of_life_is_given_up_and_its_result_dropped(tmp_path, monkeypatch):
    from secateur.search import claims

    # As on two machines that share a storage: processes cannot be seen.
    monkeypatch.setattr(claims, "_machine", lambda: "")
    path = tmp_path / "study.jsonl"
    worker = start(path, trials=3, seconds=4, heartbeat=0.2)
    assert worker.stdout.readline() == "at\n"
    os.kill(worker.pid, 19)
    try:
        result = search(path, 3, heartbeat=0.2)
        assert [trial.trial for trial in result.trials] == [0, 1, 2]
        assert len({trial.worker for trial in result.trials}) == 1
    finally:
        os.kill(worker.pid, 18)
    said = worker.communicate(timeout=100)[0]
    assert worker.returncode == 0
    assert "done 3" in said
    assert search(path, 3).trials == result.trials


def test_signs_of_life_keep_a_slow_trial(tmp_path, monkeypatch):
    from secateur.search import claims

    monkeypatch.setattr(claims, "_machine", lambda: "")
    path = tmp_path / "study.jsonl"
    worker = start(path, trials=1, seconds=6, heartbeat=0.3)
    assert worker.stdout.readline() == "at\n"
    calls = []
    # It waits for the other, whose trial takes longer than six signs of life.
    result = search(path, 1, heartbeat=0.3, objective=lambda numbers: calls.append(numbers) or objective(numbers))
    assert not calls
    assert len(result.trials) == 1
    assert "done 1" in worker.communicate(timeout=100)[0]


def test_should_stop_ends_the_waiting(tmp_path):
    path = tmp_path / "study.jsonl"
    worker = start(path, trials=1, seconds=300)
    assert worker.stdout.readline() == "at\n"
    stops = iter([False, False, True])
    try:
        result = search(path, 1, should_stop=lambda: next(stops))
    finally:
        worker.kill()
        worker.wait(timeout=30)
    assert not result.finished


def test_a_result_that_comes_twice_counts_once():
    optuna = pytest.importorskip("optuna")
    from secateur.search.claims import filled, free_slot

    def attempt(number, state, **attributes):
        return optuna.trial.FrozenTrial(
            number, state, 0.5 if state.name == "COMPLETE" else None, None, None, {}, {}, attributes, {}, {}, number
        )

    states = optuna.trial.TrialState
    attempts = [
        attempt(0, states.COMPLETE, slot=0),
        attempt(1, states.FAIL, slot=1),
        attempt(2, states.RUNNING, slot=2),
        attempt(3, states.FAIL, slot=3, reason="gain is nan"),
        attempt(4, states.COMPLETE, slot=0),
        attempt(5, states.FAIL),
    ]
    assert {slot: a.number for slot, a in filled(attempts).items()} == {0: 0, 3: 3}
    assert free_slot(attempts, 4) == 1
    assert free_slot([*attempts, attempt(6, states.RUNNING, slot=1)], 4) is None


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_what_is_done_again_later_is_done_with_the_same_numbers(tmp_path, sampler):
    optuna = pytest.importorskip("optuna")
    path = tmp_path / "study.jsonl"
    search(path, 5, sampler)
    worker = start(path, sampler, trials=12, seconds=300)
    assert worker.stdout.readline() == "at\n"
    stops = iter([False] * 5 + [True])
    others = search(path, 12, sampler, should_stop=lambda: next(stops))
    assert [trial.trial for trial in others.trials] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    worker.kill()
    worker.wait(timeout=30)
    result = search(path, 12, sampler)
    attempts = optuna.load_study(
        study_name="search",
        storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path))),
    ).trials
    lost = [attempt for attempt in attempts if attempt.state.name == "FAIL"]
    assert [attempt.params for attempt in lost] == [dict(result.trials[5].numbers)]
    assert len(result.trials) == 12
