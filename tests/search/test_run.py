"""One worker: what is tried, what is kept, what is refused, and that it repeats itself exactly."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

import secateur
from secateur.errors import CheckpointError, DivergedError, MissingExtraError, SecateurError, StorageError, UsageError
from secateur.search import STOCHASTIC_PRUNING, Choice, Float, Int, SearchSpec, Space, run_search

pytest.importorskip("optuna")

PAIR = (("gain", "maximize"), ("size", "minimize"))
MIXED = Space((Float("a", 0.0, 1.0), Float("b", 1e-3, 1.0, log=True), Int("c", 1, 6), Choice("d", ("x", "y"))))


def hill(numbers):
    """Two objectives at odds, best at b = 0.1, d = "y"."""
    gain = numbers["a"] - (math.log10(numbers["b"]) + 1) ** 2 + (numbers["d"] == "y") * 0.3
    return {"gain": gain, "size": numbers["a"] ** 2 + 0.1 * numbers["c"]}


def tried(result):
    return [dict(trial.numbers) for trial in result.trials]


def spec_of(sampler, trials=18, **changes):
    return SearchSpec(PAIR, trials, sampler, population=5, startup=5, points=3, **changes)


@pytest.mark.parametrize("sampler", ["grid", "random", "nsga2", "tpe"])
def test_every_sampler_finds_numbers_in_the_space(sampler):
    seen = []
    result = run_search(spec_of(sampler), MIXED, hill, on_trial=seen.append)
    assert result.finished
    assert [trial.trial for trial in result.trials] == list(range(18))
    assert seen == list(result.trials)
    for trial in result.trials:
        numbers = trial.numbers
        assert list(numbers) == ["a", "b", "c", "d"]
        assert 0 <= numbers["a"] <= 1
        assert 1e-3 <= numbers["b"] <= 1
        assert numbers["c"] in range(1, 7)
        assert trial.values == pytest.approx(hill(numbers))
    assert 0 < len(result.front()) < 18
    series = result.hypervolume_series((-5, 2))
    assert series == sorted(series)
    assert len(series) == 18


def test_a_whole_grid_is_tried_once():
    spec = SearchSpec((("gain", "maximize"),), None, "grid", points=3, seed=4)
    result = run_search(spec, MIXED, hill)
    assert len({tuple(numbers.values()) for numbers in tried(result)}) == len(result.trials) == 3 * 3 * 3 * 2
    best = result.front()[0].numbers
    assert (best["a"], best["d"]) == (1.0, "y")


def test_nsga2_gets_better_than_random():
    space = Space(tuple(Float(f"x{i}", 0.0, 1.0) for i in range(6)))

    def zdt1(numbers):
        first, *rest = numbers.values()
        g = 1 + 9 * sum(rest) / len(rest)
        return {"gain": -first, "size": g * (1 - math.sqrt(first / g))}

    covered = {
        sampler: run_search(SearchSpec(PAIR, 300, sampler, population=20), space, zdt1).hypervolume_series((-1.1, 6))[
            -1
        ]
        for sampler in ("nsga2", "random")
    }
    # The most there can be is 6.27.
    assert covered["nsga2"] > covered["random"] + 0.5


@pytest.mark.parametrize("sampler", ["grid", "random", "nsga2", "tpe"])
def test_stopping_and_going_on_changes_nothing(tmp_path, sampler):
    whole = run_search(spec_of(sampler), MIXED, hill)
    assert tried(run_search(spec_of(sampler), MIXED, hill)) == tried(whole)
    for until in (1, 3, 5, 6, 11, 17, 18):
        # A new storage object each time, as in a new process.
        part = run_search(spec_of(sampler, until), MIXED, hill, tmp_path / "study.jsonl")
        assert len(part.trials) == until
    assert tried(part) == tried(whole)
    assert tried(run_search(spec_of(sampler, seed=1), MIXED, hill)) != tried(whole)


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_a_trial_that_was_broken_off_is_tried_again(tmp_path, sampler):
    whole, calls = run_search(spec_of(sampler), MIXED, hill), []

    def breaks(numbers):
        calls.append(numbers)
        if len(calls) in (1, 6, 14):
            raise KeyboardInterrupt
        return hill(numbers)

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_search(spec_of(sampler), MIXED, breaks, tmp_path / "study.jsonl")
    result = run_search(spec_of(sampler), MIXED, breaks, tmp_path / "study.jsonl")
    assert tried(result) == tried(whole)
    assert len(calls) == 18 + 3
    assert calls[0] == calls[1]


def test_sqlite_is_gone_on_with(tmp_path):
    path = tmp_path / "new" / "study.db"
    stops = iter([False] * 4 + [True] * 10)
    part = run_search(spec_of("nsga2", 8), MIXED, hill, path, should_stop=lambda: next(stops))
    assert len(part.trials) == 4
    assert not part.finished
    result = run_search(spec_of("nsga2", 8), MIXED, hill, f"sqlite:///{path}")
    assert path.read_bytes().startswith(b"SQLite")
    assert tried(result) == tried(run_search(spec_of("nsga2", 8), MIXED, hill))
    # Fewer than there are: the first ones.
    assert len(run_search(spec_of("nsga2", 3), MIXED, hill, path).trials) == 3


def test_failed_trials_count_and_keep_their_reason(tmp_path):
    def fails(numbers):
        if numbers["c"] == 1:
            raise DivergedError("loss is not finite")
        if numbers["c"] in (2, 3):
            return {"gain": math.nan if numbers["c"] == 2 else math.inf, "size": 0.0, "note": math.nan}
        return hill(numbers)

    result = run_search(spec_of("random", 60), MIXED, fails, tmp_path / "study.log")
    reasons = {trial.numbers["c"]: trial.reason for trial in result.failed}
    assert reasons == {1: "DivergedError: loss is not finite", 2: "gain is nan", 3: "gain is inf"}
    assert result.finished
    assert all(trial.values is None for trial in result.failed)
    assert not {trial.trial for trial in result.front()} & {trial.trial for trial in result.failed}
    assert len(result.hypervolume_series((-5, 2))) == 60 - len(result.failed)
    # They are not tried again.
    again = run_search(spec_of("random", 60), MIXED, hill, tmp_path / "study.log")
    assert again.failed == result.failed


def test_an_error_if_all_failed():
    def fails(numbers):
        raise DivergedError("loss is not finite")

    with pytest.raises(SecateurError, match="all 3 trials failed; the first: DivergedError: loss is not finite"):
        run_search(spec_of("nsga2", 3), MIXED, fails)


def test_other_errors_end_the_search(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run_search(spec_of("random"), MIXED, lambda numbers: 1 / 0, tmp_path / "study.jsonl")
    with pytest.raises(UsageError, match='expected "gain"'):
        run_search(spec_of("random"), MIXED, lambda numbers: {"size": 1.0}, tmp_path / "study.jsonl")
    with pytest.raises(UsageError, match="expected a number"):
        run_search(spec_of("random"), MIXED, lambda numbers: {"gain": "much", "size": 1.0}, tmp_path / "study.jsonl")
    with pytest.raises(UsageError, match="heartbeat"):
        run_search(spec_of("random"), MIXED, hill, heartbeat=0)
    assert len(run_search(spec_of("random", 2), MIXED, hill, tmp_path / "study.jsonl").trials) == 2


def test_extras_are_kept(tmp_path):
    def more(numbers):
        return hill(numbers) | {"accuracies": (0.5, math.nan), "seconds": 1}

    run_search(spec_of("random", 2), MIXED, more, tmp_path / "study.jsonl")
    result = run_search(spec_of("random", 2), MIXED, more, tmp_path / "study.jsonl")
    assert result.trials[0].extras == {"accuracies": [0.5, None], "seconds": 1}
    assert result.record()["trials"][0]["extras"]["seconds"] == 1


@pytest.mark.parametrize("name", ["study.db", "study.jsonl"])
def test_another_recipe_is_refused(tmp_path, name):
    path = tmp_path / name
    run_search(spec_of("nsga2", 2), STOCHASTIC_PRUNING, lambda n: {"gain": 0, "size": 0}, path, basis={"network": "1"})
    wider = Space((Float("sigma", 1e-4, 1e-1), Float("sparsity", 0.01, 0.99)))
    turned = SearchSpec((("gain", "maximize"), ("size", "maximize")), 2, population=5)
    for spec, space, basis, says in [
        (spec_of("tpe"), STOCHASTIC_PRUNING, {"network": "1"}, 'sampler \\("nsga2" there, "tpe" asked for'),
        (spec_of("nsga2", seed=1), STOCHASTIC_PRUNING, {"network": "1"}, "differs in seed \\(0 there, 1 asked for\\)"),
        (SearchSpec(PAIR, 2, population=6), STOCHASTIC_PRUNING, {"network": "1"}, "nsga2 population"),
        (spec_of("nsga2"), wider, {"network": "1"}, "differs in number sigma"),
        (spec_of("nsga2"), STOCHASTIC_PRUNING, {"network": "2"}, 'network \\("1" there, "2" asked for'),
        (turned, STOCHASTIC_PRUNING, {"network": "1"}, "differs in objectives"),
    ]:
        with pytest.raises(CheckpointError, match=says) as caught:
            run_search(spec, space, hill, path, basis=basis)
        assert "\n" not in str(caught.value)
    # Another name in the same file is another study.
    other = run_search(spec_of("random", 1), STOCHASTIC_PRUNING, lambda n: {"gain": 0, "size": 0}, path, "other")
    assert len(other.trials) == 1


def test_files_that_are_no_studies(tmp_path):
    text = tmp_path / "notes.json"
    text.write_text('{"a": 1}')
    with pytest.raises(CheckpointError, match="neither a SQLite"):
        run_search(spec_of("random"), MIXED, hill, text)
    assert text.read_text() == '{"a": 1}'
    with pytest.raises(UsageError, match="folder"):
        run_search(spec_of("random"), MIXED, hill, tmp_path)
    torn = tmp_path / "torn.db"
    torn.write_bytes(b"SQLite format 3\0" + b"\7" * 200)
    with pytest.raises(StorageError):
        run_search(spec_of("random"), MIXED, hill, torn)
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"op_code":0,\n{"op_code":1}\n')
    with pytest.raises(CheckpointError, match="damaged"):
        run_search(spec_of("random"), MIXED, hill, damaged)
    with pytest.raises((UsageError, StorageError)) as caught:
        run_search(spec_of("random"), MIXED, hill, "nosuch://me:secret@host/db")
    assert "secret" not in str(caught.value)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        run_search(spec_of("random"), MIXED, hill, tmp_path / "file" / "study.db")


def test_a_journal_cut_off_in_a_line_is_mended(tmp_path):
    path = tmp_path / "study.jsonl"
    whole = run_search(spec_of("nsga2", 8), MIXED, hill)
    run_search(spec_of("nsga2", 4), MIXED, hill, path)
    path.write_bytes(path.read_bytes()[:-7])
    assert tried(run_search(spec_of("nsga2", 8), MIXED, hill, path)) == tried(whole)


def test_a_study_of_others_is_left_alone(tmp_path):
    import optuna

    path = tmp_path / "study.db"
    theirs = optuna.create_study(storage=f"sqlite:///{path}", study_name="search", directions=["maximize", "minimize"])
    theirs.add_trial(optuna.trial.create_trial(values=[0.0, 0.0]))
    with pytest.raises(CheckpointError, match="not begun by secateur"):
        run_search(spec_of("random"), MIXED, hill, path)


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'secateur\[search\]'") as caught:
        run_search(spec_of("random"), MIXED, hill)
    assert caught.value.exit_code == 3


def test_nothing_heavy_is_imported():
    code = (
        "import sys; import secateur.search as s; from secateur.search import *; assert 'optuna' not in sys.modules\n"
        "spec = SearchSpec((('a', 'maximize'),), 3, 'random')\n"
        "run_search(spec, STOCHASTIC_PRUNING, lambda n: {'a': n['sigma']}); assert 'torch' not in sys.modules"
    )
    source = str(Path(secateur.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": source}, timeout=120)
