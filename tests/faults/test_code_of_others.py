"""Criteria, regularizers and networks of others that are broken: one line that names them, and nothing else stops."""

from __future__ import annotations

import re
import sys

import pytest

METHODS = """\
from dataclasses import dataclass
from secateur import Criterion, WeightNoise

@dataclass(frozen=True)
class Good(Criterion):
    summary = "a good one"
    def score(self, evidence):
        return evidence.weight.abs()

@dataclass(frozen=True)
class Raises(Good):
    def score(self, evidence):
        return evidence.wieght

@dataclass(frozen=True)
class NoTensor(Good):
    def score(self, evidence):
        return None

@dataclass(frozen=True)
class Misspelled(Good):
    needs = frozenset({"gradeints"})

@dataclass(frozen=True)
class Wants(Good):
    def wanted(self):
        return frozenset({"norms"})

@dataclass(frozen=True)
class CannotSay(Good):
    def wanted(self):
        return 1 / 0

@dataclass(frozen=True)
class Picky(Good):
    def __post_init__(self):
        raise KeyError("picky")

@dataclass
class Warm(Criterion):
    def score(self, evidence):
        return evidence.weight

class Plain(Criterion):
    def score(self, evidence):
        return evidence.weight

@dataclass(frozen=True)
class Unwritten(Criterion):
    pass

@dataclass(frozen=True)
class Noise(WeightNoise):
    def multiplier(self, target, weight, stream, progress):
        return {}[target.name]

@dataclass(frozen=True)
class Nowhere(Noise):
    acts_on = "weights"

def network(num_classes, in_shape):
    raise ValueError("no network today")

nothing = 3
"""
ENTRIES = """\
[secateur.criteria]
good = broken_package.methods:Good
no_module = broken_package.nothing:Good
no_attribute = broken_package.methods:Goood
bad_syntax = broken_package.syntax:Good
fails = broken_package.fails:Good
leaves = broken_package.leaves:Good
no_class = broken_package.methods:nothing
no_dataclass = broken_package.methods:Plain
magnitude = broken_package.methods:Good
[secateur.regularizers]
noise = broken_package.methods:Noise
noise = broken_package.methods:Nowhere
[secateur.models]
no_network = broken_package.methods:netwrok
"""
BROKEN = {
    "no_module": "does not import: ModuleNotFoundError: No module named 'broken_package.nothing'",
    "no_attribute": "does not import: AttributeError: .* no attribute 'Goood'",
    "bad_syntax": r"does not import: SyntaxError: .*syntax\.py, line 2",
    "fails": r"does not import: ZeroDivisionError: division by zero \(fails\.py:3\)",
    "leaves": "does not import: SystemExit: bye",
    "no_class": "is not a subclass of Criterion",
    "no_dataclass": "is not a frozen dataclass",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package of which little works."""
    folder, info = tmp_path / "site" / "broken_package", tmp_path / "site" / "broken-1.0.dist-info"
    folder.mkdir(parents=True)
    info.mkdir()
    (folder / "__init__.py").touch()
    (folder / "methods.py").write_text(METHODS)
    (folder / "syntax.py").write_text("a = 1\ndef f(:\n")
    (folder / "fails.py").write_text("a = 1\n\na / 0\n")
    (folder / "leaves.py").write_text("import sys\nsys.exit('bye')\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield folder
    for name in [n for n in sys.modules if n.startswith("broken_package")]:
        del sys.modules[name]


@pytest.fixture
def ask(package, tmp_path, secateur):
    """Check or run a recipe with this criterion, regularizer and network; the one line it is refused with."""
    recipe = tmp_path / "own.yaml"

    def ask(command: str, code: int, criterion="magnitude", regularizer="none", model="digits_cnn") -> str:
        recipe.write_text(
            f"name: own\ndata: {{subset: 50}}\ntrain: {{duration: 2it}}\nmodel: {{name: '{model}'}}\n"
            f"methods: [{{label: a, regularizer: '{regularizer}'}}]\n"
            f"prune: [{{criterion: '{criterion}', sparsities: [0.5]}}]\n"
        )
        options = ["--out", tmp_path / "runs", "-q"] if command == "run" else []
        answer = secateur(command, recipe, "--allow-code", "broken_package", *options, "--json")
        assert answer.code == code, answer.err
        if not code:
            return ""
        assert re.fullmatch(r"secateur: [^\n]+\n", answer.err), answer.err
        assert answer.json["error"]["exit_code"] == code
        return answer.json["error"]["message"]

    return ask


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *(pytest.param(name, words) for name, words in BROKEN.items()),
        ("python:broken_package.nothing:Good", "does not import: ModuleNotFoundError"),
        ("python:broken_package.methods:Goood", "does not import: AttributeError"),
        ("python:broken_package.syntax:Good", r"does not import: SyntaxError: .*syntax\.py, line 2"),
        ("python:broken_package.fails:Good", r"does not import: ZeroDivisionError: division by zero \(fails\.py:3\)"),
        ("python:broken_package.leaves:Good", "does not import: SystemExit: bye"),
        ("python:broken_package.methods:nothing", "is not a subclass of Criterion"),
        ("python:broken_package.methods:Noise", "is not a subclass of Criterion"),
        ("python:broken_package.methods:Plain", r"write @dataclass\(frozen=True\) above class Plain"),
        ("python:broken_package.methods:Warm", r"write @dataclass\(frozen=True\) above class Warm"),
        ("python:broken_package.methods:Unwritten", "does not define score"),
        ("python:broken_package.methods:Misspelled", 'unknown need "gradeints"; nearest: gradients'),
        ("python:broken_package.methods:Wants", 'unknown need "norms"; nearest: norm'),
    ],
)
def test_a_criterion_that_cannot_be_used_is_refused_by_check(ask, name, words):
    message = ask("check", 2, criterion=name)
    assert re.search(rf'own\.yaml:6: prune\[0\]\.criterion: (criterion )?"{re.escape(name)}".*{words}', message), (
        message
    )


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("CannotSay", r"asked what it needs: ZeroDivisionError: division by zero \(methods\.py:\d+, in wanted\)"),
        ("Picky", r"made: KeyError: 'picky' \(methods\.py:\d+, in __post_init__\)"),
    ],
)
def test_a_criterion_that_raises_when_it_is_made(ask, name, words):
    message = ask("check", 1, criterion=f"python:broken_package.methods:{name}")
    assert re.search(f'criterion "python:broken_package.methods:{name}" failed when {words}', message), message


def test_other_kinds_are_refused_by_check_too(ask):
    assert 'unknown acts_on "weights"' in ask("check", 2, regularizer="python:broken_package.methods:Nowhere")
    assert 'model "no_network" does not import' in ask("check", 2, model="no_network")
    message = ask("check", 1, model="python:broken_package.methods:network")
    assert re.search(r"failed when built: ValueError: no network today \(methods\.py:\d+, in network\)", message), (
        message
    )


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("criterion", "Raises", r"scoring: AttributeError: .*wieght' \(methods\.py:\d+, in score\)"),
        ("criterion", "NoTensor", "scoring: AttributeError: 'NoneType' object has no attribute 'shape'; repair"),
        ("regularizer", "Noise", r"training \"a\", seed 0: KeyError: .* \(methods\.py:\d+, in multiplier\)"),
    ],
)
def test_a_method_that_raises_in_a_run_is_named(ask, secateur, tmp_path, kind, name, words):
    own = f"python:broken_package.methods:{name}"
    message = ask("run", 1, **{kind: own})
    assert re.search(f'{kind} "{own}" failed when {words}', message), message
    options = ["--allow-code", "broken_package", "--out", tmp_path / "runs", "-q"]
    shown = secateur("--debug", "run", tmp_path / "own.yaml", *options)
    assert shown.code == 1
    assert "Traceback" in shown.err
    assert "in score" in shown.err or "in multiplier" in shown.err
    assert "Traceback" not in secateur("run", tmp_path / "own.yaml", *options).err


def test_what_is_broken_is_listed_and_stops_nothing_else(package, ask, secateur):
    listed = secateur("methods", "--json")
    assert listed.code == 0, listed.err
    names = [row["name"] for row in listed.json["methods"]]
    assert {"good", "noise", "magnitude"} <= {*names}
    assert not {*names} & BROKEN.keys()
    found = {entry["name"]: entry["reason"] for entry in listed.json["broken"]}
    assert found.keys() == {*BROKEN, "magnitude", "noise"}
    assert all(re.match(words, found[name]) for name, words in BROKEN.items()), found
    assert "ships with secateur" in found["magnitude"]
    assert "another installed package registers that name" in found["noise"]
    shown = secateur("methods")
    assert shown.code == 0
    assert shown.out.count("\nbroken: ") == len(found)
    assert "broken: criterion fails (broken_package.fails:Good): does not import" in shown.out
    assert ask("check", 0, criterion="good") == ""
    assert ask("check", 0, criterion="magnitude") == ""


def test_doctor_lists_what_is_broken(package, secateur):
    found = {entry["name"]: entry["kind"] for entry in secateur("doctor", "--json").json["broken"]}
    assert found.keys() == {*BROKEN, "magnitude", "noise", "no_network"}
    assert found["no_network"] == "model"
    assert "broken entry" in secateur("doctor").out


def test_a_broken_method_is_explained_by_its_reason(package, secateur):
    answer = secateur("methods", "fails")
    assert answer.code == 2
    assert re.fullmatch(r'secateur: criterion "fails" does not import: ZeroDivisionError.*\n', answer.err)
    assert secateur("methods", "magnitude").code == 0
