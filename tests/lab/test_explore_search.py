"""The search section: its front again from its recipes, the network delivered, several workers, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.analysis.cost import safetensors_bytes
from secateur.errors import CheckpointError, DataError, MissingExtraError, SecateurError
from secateur.lab.context import Options
from secateur.lab.explore import search
from secateur.lab.explore.deliver import run as run_deliver
from secateur.lab.explore.problems import make_problem, stored_bytes
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.explore.run import explore
from secateur.lab.explore.session import Session
from secateur.lab.explore.specs import DeliverSpec
from secateur.lab.listener import Interrupted, Listener
from secateur.lab.recipe_file import load_any
from secateur.lab.report.explore.render import views, write_exploration
from secateur.lab.report.explore.search import view
from secateur.search import SearchSpec, run_search
from secateur.surgery.file import load_pruned
from secateur.variants import NoisyPrune, evaluate_variants

pytest.importorskip("optuna")

BASE = {
    "name": "small",
    "data": {"name": "digits", "subset": 300},
    "model": {"name": "digits_cnn", "kwargs": {"widths": [4, 6, 8]}},
    "train": {"duration": "4ep", "batch_size": 50},
    "judge": {"images": 100},
}
WEIGHTS = {
    "kind": "search",
    "trials": 5,
    "population": 3,
    "variants": 2,
    "objectives": ["accuracy", "sparsity", "bytes"],
}
UNITS = {"kind": "search", "vary": "units", "trials": 4, "population": 2, "sparsity": [0.0, 0.6]}


def _recipe(*sections, **changes):
    return ExploreRecipe.model_validate({**BASE, "explore": list(sections), **changes})


def _values(trials):
    return [{**t["values"], "numbers": t["numbers"]} for t in trials]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def options(out):
    return Options(out=out, device="cpu")


@pytest.fixture(scope="module")
def result(options):
    """Both ways to vary, in one exploration."""
    second = {**UNITS, "title": "units", "objectives": ["accuracy", "sparsity", "latency", "bytes"]}
    return explore(_recipe(WEIGHTS, second, seed=1), options)


@pytest.fixture(scope="module")
def session(options, result):
    return Session(_recipe(WEIGHTS, seed=1), options)


@pytest.fixture
def undelivered(result, monkeypatch):
    """Searches deliver nothing of their own: that takes a process each time."""
    monkeypatch.setattr(search, "deliver", lambda *arguments: result["sections"][0]["delivered"])


def _folder(options, section):
    return options.out / "stages" / f"explore-{section['stage']}"


def test_all_trials_are_there_once_and_the_front_is_undominated(result):
    for section, trials in zip(result["sections"], (5, 4), strict=True):
        assert [t["trial"] for t in section["trials"]] == list(range(trials))
        worth = [
            [sign * t["values"][n] for n, sign in zip(section["objectives"], _signs(section), strict=True)]
            for t in section["trials"]
        ]
        best = {
            tuple(a) for a in worth if not any(all(x >= y for x, y in zip(b, a, strict=True)) and b != a for b in worth)
        }
        assert len(section["front"]) == len(best)
        assert section["judged"] == 100
        assert section["held"] == 260
        series = (section["hypervolume"] or {"series": []})["series"]
        assert series == sorted(series)


def _signs(section):
    return [1 if direction == "maximize" else -1 for direction in section["directions"]]


def test_trials_are_worth_what_their_numbers_say(result, session):
    section = result["sections"][0]
    for trial in section["trials"]:
        wanted = [NoisyPrune(**trial["numbers"], seed=seed) for seed in range(2)]
        means = evaluate_variants(session.bench(), wanted, session.judged).means()
        assert trial["values"]["accuracy"] == pytest.approx(means.mean(), abs=1e-12)
        assert trial["values"]["sparsity"] == trial["numbers"]["sparsity"]


@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_recipe_makes_each_point_of_the_front_again(result, options, which):
    section = result["sections"][which]
    recipes = [load_any(_folder(options, section) / point["recipe"]) for point in section["front"]]
    # To the last bit, through YAML.
    assert [recipe.explore[0].numbers for recipe in recipes] == [point["numbers"] for point in section["front"]]
    point = section["front"][-1]
    again = explore(recipes[-1], options)["sections"][0]
    assert again["values"]["accuracy"] == point["values"]["accuracy"]
    assert again["values"]["sparsity"] == point["values"]["sparsity"]
    assert again["delivered"]["accuracy"]["delivered"] == point["held_accuracy"]


def test_the_files_delivered_reload_in_a_fresh_process_with_the_very_accuracy(result, session, tmp_path):
    torch.save(list(session.held), tmp_path / "held.pt")
    code = (
        "import sys, torch\nfrom secateur.surgery.file import load_pruned\nbatches = torch.load(sys.argv[1])\n"
        "for file in sys.argv[2:]:\n    model = load_pruned(file).eval()\n"
        "    print(sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / sum(len(y) for _, y in batches))"
    )
    found = [section["delivered"] for section in result["sections"]]
    files = [delivered["file"]["path"] for delivered in found]
    command = [sys.executable, "-c", code, str(tmp_path / "held.pt"), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [float(line) for line in done.stdout.split()] == [d["accuracy"]["delivered"] for d in found]
    right, count = session.accuracy(session.network, session.held)
    for delivered in found:
        assert delivered["held"] == count == 260
        assert delivered["file"]["reload_max_abs_diff"] == 0
        assert delivered["accuracy"]["dense"] == right / count


def test_weights_are_stored_sparse_and_not_called_faster(result):
    section = result["sections"][0]
    delivered, chosen = section["delivered"], section["front"][section["chosen"]]
    assert delivered["cut"] is False
    zero = 1 - delivered["costs"]["delivered"]["nonzero"] / delivered["costs"]["dense"]["nonzero"]
    weights = sum(p.numel() for n, p in load_pruned(delivered["file"]["path"]).named_parameters() if "weight" in n)
    assert zero * delivered["costs"]["dense"]["params"] <= chosen["values"]["sparsity"] * weights + 1
    assert delivered["costs"]["delivered"]["params"] == delivered["costs"]["dense"]["params"]
    words = " ".join(views(result)[0].lines)
    assert "in memory the network is as large as before and no faster (measured: " in words
    assert "stored sparse" in words


def test_units_are_cut_with_proof_and_timed(result):
    section = result["sections"][1]
    delivered = section["delivered"]
    assert delivered["cut"] is True
    assert delivered["max_abs_diff"] <= 1e-5
    assert delivered["costs"]["delivered"]["params"] <= delivered["costs"]["dense"]["params"]
    assert all(0 < point["latency_again"] < 10 for point in section["front"])
    for trial in section["trials"]:
        assert 0 < trial["values"]["latency"] < 10
        # A network that gives one answer to everything proves nothing, and says so.
        assert trial["extras"]["max_abs_diff"] is None or trial["extras"]["max_abs_diff"] <= 1e-5
    assert any("Its units are cut for real (" in line for line in views(result)[1].lines)


def test_the_bytes_searched_by_are_those_of_the_file(result):
    weights, units = result["sections"]
    stored = load_file(weights["delivered"]["file"]["path"])
    # A search takes the first of the networks of a point, delivery the best.
    assert _chosen_bytes(weights) == pytest.approx(sum(t.nbytes for t in stored.values()), rel=0.05)
    assert _chosen_bytes(weights) < 0.9 * safetensors_bytes(load_pruned(weights["delivered"]["file"]["path"]))
    assert _chosen_bytes(units) == stored_bytes(load_pruned(units["delivered"]["file"]["path"]))


def _chosen_bytes(section):
    return section["front"][section["chosen"]]["values"]["bytes"]


def test_the_report_of_both(result, tmp_path):
    first, second = views(result)
    assert [p.name for p in first.pictures] == ["search-sparsity", "search-bytes", "search-hypervolume"]
    assert [p.name for p in second.pictures] == ["units-sparsity", "units-latency", "units-bytes"]
    assert len(first.tables[0].rows) == len(result["sections"][0]["front"])
    assert first.lines[0].startswith("5 trials by nsga2, ")
    # A report can be written again from the file alone.
    path = write_exploration(json.loads(json.dumps(result)), tmp_path)
    text = path.read_text()
    assert "point-0.yaml" in text
    assert "<script" not in text


def test_a_second_run_keeps_everything(result, options):
    class Counting(Listener):
        kept: list[bool] = []

        def stage_finished(self, title, cached):
            self.kept.append(cached)

    listener = Counting()
    second = {**UNITS, "title": "units", "objectives": ["accuracy", "sparsity", "latency", "bytes"]}
    again = explore(_recipe(WEIGHTS, second, seed=1), options, listener)
    assert listener.kept == [True] * 3
    assert again["sections"] == result["sections"]


def _point(number, accuracy, **values):
    return {"trial": number, "values": {"accuracy": accuracy, **values}}


def test_which_network_is_delivered():
    spec = _recipe({**WEIGHTS, "objectives": ["sparsity", "accuracy"], "tolerance": 0.02}).explore[0]
    front = [_point(n, a, sparsity=s) for n, (a, s) in enumerate([(0.95, 0.1), (0.9, 0.5), (0.88, 0.7), (0.5, 0.99)])]
    chosen, why = search._choose(spec, front, 0.9)
    assert chosen == 2
    assert why.startswith("the best sparsity on the front within 2.00 points of the dense network's accuracy")
    chosen, why = search._choose(spec, front, 0.99)
    assert chosen == 0
    assert why.startswith("the highest accuracy: no point of the front is within 2.00 points")
    small = _recipe({**WEIGHTS, "objectives": ["accuracy", "bytes"]}).explore[0]
    front = [_point(n, 0.9, bytes=b) for n, b in enumerate((300.0, 100.0, 200.0))]
    assert search._choose(small, front, 0.9)[0] == 1


def test_latency_decides_as_it_was_timed_again():
    spec = _recipe({**UNITS, "objectives": ["accuracy", "latency"]}).explore[0]
    front = [{**_point(n, 0.9, latency=a), "latency_again": b} for n, (a, b) in enumerate([(0.5, 0.8), (0.6, 0.7)])]
    assert search._choose(spec, front, 0.9)[0] == 1


def test_gain_of_noise(session, tmp_path, undelivered):
    spec = _recipe({**WEIGHTS, "objectives": ["accuracy", "gain"], "trials": 3}).explore[0]
    found = search.run(session, spec, tmp_path)
    for trial in found["trials"]:
        plain = NoisyPrune(0.0, trial["numbers"]["sparsity"])
        (mean,) = evaluate_variants(session.bench(), [plain], session.judged).means()
        assert trial["extras"]["plain"] == mean
        gain = trial["values"]["accuracy"] - mean
        assert trial["values"]["gain"] == pytest.approx(gain * trial["numbers"]["sparsity"] if gain > 0 else gain)
    section = {"kind": "search", "title": "G", "spec": spec.model_dump(mode="json"), "stage": "x", **found}
    assert any(line.startswith("Largest gain of noise: sigma ") for line in view(section, "g").lines)


def test_a_budget_stops_and_one_trial_is_made_however_short_it_is(session, tmp_path, undelivered):
    spec = _recipe({**WEIGHTS, "trials": None, "budget": "0.001s", "seed": 7}).explore[0]
    found = search.run(session, spec, tmp_path)
    assert len(found["trials"]) == 1
    assert len(found["front"]) == 1


def test_a_search_that_is_asked_for_more_goes_on_with_what_there_is(session, tmp_path, monkeypatch, undelivered):
    def spec(**changes):
        return _recipe({**WEIGHTS, "seed": 8, **changes}).explore[0]

    whole = search.run(session, spec(trials=5, storage=str(tmp_path / "whole.db")), tmp_path / "whole")
    made = []
    values = type(make_problem(session, spec())).values

    def counted(self, numbers, names):
        made.append(numbers)
        return values(self, numbers, names)

    monkeypatch.setattr(type(make_problem(session, spec())), "values", counted)
    few = search.run(session, spec(trials=2), tmp_path / "few")
    more = search.run(session, spec(trials=5, title="longer", tolerance=0.5), tmp_path / "more")
    assert len(made) == 5, "what there is is not tried again"
    assert _values(few["trials"]) == _values(whole["trials"][:2])
    assert _values(more["trials"]) == _values(whole["trials"])
    assert len(search.run(session, spec(trials=None, budget="0.001s"), tmp_path / "time")["trials"]) == 6
    assert _values(search.run(session, spec(trials=2), tmp_path / "again")["trials"]) == _values(few["trials"])
    assert len(made) == 6


def test_a_stop_in_a_trial_is_no_failed_trial(session, tmp_path, monkeypatch, undelivered):
    spec = _recipe({**WEIGHTS, "storage": str(tmp_path / "parts.db")}).explore[0]
    whole = search.run(session, _recipe(WEIGHTS).explore[0], tmp_path / "whole")
    listener = Listener()
    monkeypatch.setattr(session.context, "listener", listener)
    problem = make_problem(session, spec)
    values = type(problem).values

    def stopped_inside(self, numbers, names):
        stopped_inside.calls += 1
        listener.stop = stopped_inside.calls == 3
        return values(self, numbers, names)

    stopped_inside.calls = 0
    monkeypatch.setattr(type(problem), "values", stopped_inside)
    with pytest.raises(Interrupted, match="run the same command again"):
        search.run(session, spec, tmp_path / "parts")
    monkeypatch.setattr(session.context, "listener", Listener())
    rest = search.run(session, spec, tmp_path / "parts")
    assert _values(rest["trials"]) == _values(whole["trials"])
    assert stopped_inside.calls == 5 + 1, "only what was broken off is tried again"
    assert rest["front"][0]["values"] == whole["front"][0]["values"]


@pytest.mark.parametrize("change", [{"variants": 3}, {"sparsity": [0.1, 0.5]}, {"criterion": "lamp"}, {"seed": 4}])
def test_a_study_of_another_recipe_is_refused_in_one_line(session, tmp_path, change, undelivered):
    storage = str(tmp_path / "study.db")
    spec = _recipe({**WEIGHTS, "trials": 1, "storage": storage}).explore[0]
    search.run(session, spec, tmp_path / "a")
    before = run_search_trials(storage, session, spec)
    other = _recipe({**WEIGHTS, "trials": 2, "storage": storage, **change}).explore[0]
    with pytest.raises(CheckpointError, match="differs in ") as caught:
        search.run(session, other, tmp_path / "b")
    assert "\n" not in str(caught.value)
    assert "study.db" in str(caught.value)
    assert run_search_trials(storage, session, spec) == before, "nothing is lost"


def run_search_trials(storage, session, spec):
    """What the study holds, read by going on with it: there is nothing left to do."""
    return [t.record() for t in _study(storage, session, spec)]


def _study(storage, session, spec):
    problem = make_problem(session, spec)
    basis = {
        "network": session.bench().fingerprint(),
        "images": session.judged_fingerprint,
        "vary": spec.vary,
        "variants": spec.variants,
        "criterion": dict(spec.criterion),
    }
    directions = tuple((name, search.DIRECTIONS[name]) for name in spec.objectives)
    asked = SearchSpec(directions, spec.trials, spec.sampler, seed=spec.seed, population=spec.population)
    return run_search(asked, problem.space(spec), lambda numbers: {}, storage, basis=basis).trials


def test_a_study_of_another_network_is_refused(session, tmp_path, undelivered):
    storage = str(tmp_path / "study.jsonl")
    spec = _recipe({**WEIGHTS, "trials": 1, "storage": storage}).explore[0]
    search.run(session, spec, tmp_path / "a")
    other = Session(_recipe(WEIGHTS, seed=2), session.context.options)
    other.train()
    with pytest.raises(CheckpointError, match=r'differs in network \("[0-9a-f]{8}\.\.\."'):
        search.run(other, spec, tmp_path / "b")
    judged = Session(_recipe(WEIGHTS, seed=1, judge={"images": 99}), session.context.options)
    with pytest.raises(CheckpointError, match="differs in images"):
        search.run(judged, spec, tmp_path / "c")


WORKER = """
import sys
from secateur.cli import main
sys.argv = ["secateur", "run", sys.argv[1], "--out", sys.argv[2], "--device", "cpu", "--threads", "1", "--json", "-q"]
main()
"""


@pytest.mark.slow
def test_two_workers_share_the_trials_of_one_study(result, tmp_path, out):
    """Two processes with folders of their own and one storage; each reports all trials."""
    weights = tmp_path / "network.safetensors"
    (trained,) = [p for p in out.glob("stages/train-*/model.safetensors") if _is(p, result)]
    weights.write_bytes(trained.read_bytes())
    section = {**WEIGHTS, "trials": 8, "sampler": "random", "storage": str(tmp_path / "shared.jsonl")}
    recipe = {k: v for k, v in BASE.items() if k != "train"} | {"weights": {"file": str(weights)}, "explore": [section]}
    path = tmp_path / "shared.yaml"
    path.write_text(json.dumps(recipe))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(path), str(tmp_path / name)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    said = [worker.communicate(timeout=200) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], [errors for _, errors in said]
    sections = [json.loads(text)["sections"][0] for text, _ in said]
    assert sections[0]["trials"] == sections[1]["trials"]
    trials = sections[0]["trials"]
    assert [t["trial"] for t in trials] == list(range(8))
    assert len({tuple(t["numbers"].values()) for t in trials}) == 8
    assert len({t["worker"] for t in trials}) <= 2
    assert sections[0]["delivered"]["accuracy"] == sections[1]["delivered"]["accuracy"]


def _is(path, result):
    return path.parent.name.endswith(result["network"]["source"]["train"])


def test_every_trial_failing_is_said_also_within_a_budget(session, tmp_path, monkeypatch):
    from secateur.lab.explore.problems import WeightProblem

    def fail(self, numbers, names):
        raise DataError("no good")

    monkeypatch.setattr(WeightProblem, "values", fail)
    for change in ({"trials": 2, "seed": 11}, {"trials": None, "budget": "0.01s", "seed": 12}):
        spec = _recipe({**WEIGHTS, **change}).explore[0]
        with pytest.raises(SecateurError, match=r"all \d+ trials failed; the first: DataError: no good"):
            search.run(session, spec, tmp_path / str(change["trials"]))


def test_values_that_are_not_numbers_fail_their_trial_and_no_other(session, tmp_path, monkeypatch, undelivered):
    from secateur.lab.explore.problems import WeightProblem

    values = WeightProblem.values

    def now_and_then(self, numbers, names):
        now_and_then.calls += 1
        return values(self, numbers, names) | ({"accuracy": float("nan")} if now_and_then.calls == 2 else {})

    now_and_then.calls = 0
    monkeypatch.setattr(WeightProblem, "values", now_and_then)
    spec = _recipe({**WEIGHTS, "seed": 13}).explore[0]
    found = search.run(session, spec, tmp_path)
    assert [t["trial"] for t in found["trials"] if t["values"] is None] == [1]
    assert found["trials"][1]["reason"] == "accuracy is nan"
    section = {"kind": "search", "title": "S", "spec": spec.model_dump(mode="json"), "stage": "x", **found}
    assert "1 trial failed; the first: accuracy is nan." in view(section, "s").lines
    assert "NaN" not in json.dumps(found)


def test_a_network_that_answers_nothing_is_told_at_once(session, tmp_path):
    state = {name: tensor.clone() for name, tensor in session.network.state_dict().items()}
    state["head.bias"][3] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    recipe = {k: v for k, v in BASE.items() if k != "train"} | {"weights": {"file": str(tmp_path / "nan.safetensors")}}
    with pytest.raises(DataError, match="outputs are not finite for 100 of 100 images") as caught:
        explore(ExploreRecipe.model_validate({**recipe, "explore": [WEIGHTS]}), Options(tmp_path / "o", device="cpu"))
    assert "nan.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    nan = Session(ExploreRecipe.model_validate({**recipe, "explore": [WEIGHTS]}), Options(tmp_path / "o", device="cpu"))
    assert nan.accuracy(nan.network, nan.judged) == (0, 100), "what is not finite is not right"


def test_what_is_missing_is_said_before_training(tmp_path, monkeypatch):
    from secateur.lab.explore import checks as module

    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"secateur\[search\]"):
        explore(_recipe(WEIGHTS), Options(tmp_path, device="cpu"))
    assert not list(Path(tmp_path).glob("stages/train-*"))


def test_sections_whose_titles_differ_only_in_signs_have_files_of_their_own(result):
    first = result["sections"][0]
    both = {**result, "sections": [{**first, "title": "a b"}, {**first, "title": "A-B!"}, {**first, "title": "a: b"}]}
    names = [picture.name for shown in views(both) for picture in shown.pictures]
    assert len(set(names)) == len(names) == 9


def test_units_that_lose_nothing_are_the_dense_network(result, options):
    session = Session(_recipe(WEIGHTS, seed=1), options)
    spec = DeliverSpec(
        kind="deliver", vary="units", numbers=dict.fromkeys(session.context.groups.prunable().names, 0.0)
    )
    folder = options.out / "nothing"
    folder.mkdir()
    delivered = run_deliver(session, spec, folder)["delivered"]
    assert delivered["accuracy"]["delivered"] == delivered["accuracy"]["dense"]
    assert delivered["costs"]["delivered"]["params"] == delivered["costs"]["dense"]["params"]
    assert delivered["what"].startswith("0 of ")


def test_groups_that_cannot_be_cut_alone_are_left_out(tmp_path):
    """Padded shortcuts have the widths of the stages written into their code."""
    recipe = _recipe(
        {**UNITS, "objectives": ["accuracy", "bytes"]}, model={"name": "resnet20"}, train={"duration": "1it"}
    )
    session = Session(recipe, Options(out=tmp_path, device="cpu"))
    session.train()
    problem = make_problem(session, recipe.explore[0])
    names = problem.space(recipe.explore[0]).names
    assert names
    assert all(name.endswith(("conv1.weight", "conv1")) for name in names), names
    assert problem.notes
    numbers = dict.fromkeys(names, 0.5)
    assert problem.make(numbers).plans
