"""Recipes: what is wrong is said with file, line, key path, got and expected; nothing else ever escapes."""

from __future__ import annotations

import copy
import datetime
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from secateur.errors import RecipeError, UnknownNameError, UsageError
from secateur.lab.plugins import make_criterion, make_regularizer
from secateur.lab.recipe import PruneSpec
from secateur.lab.recipe_file import load_any, load_recipe, shipped_recipes, write_recipe

GOOD = """\
name: good
seeds: [0, 1]
data:
  name: digits
  validation: 0.1
model: {name: digits_cnn, kwargs: {widths: [8, 8, 8]}}
train:
  duration: 2ep
  optimizer: {name: sgd, lr: 0.1}
  lr_schedule: {name: step, milestones: [1ep]}
methods:
  - label: plain
    regularizer: none
  - label: targeted
    regularizer: {name: targeted_dropout, gamma: 0.5}
    exclude: ["@last"]
prune:
  - granularity: weight
    criterion: magnitude
    sparsities: [0.0, 0.5]
  - {granularity: unit, sparsities: [0.25]}
final: {method: targeted, prune: 1, fine_tune: {duration: 4it}, exports: [onnx]}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_validate(name):
    recipe = load_any(name)
    assert recipe.name == name
    assert recipe.description
    assert type(recipe).model_validate(recipe.resolved()) == recipe


def test_a_resolved_recipe_written_and_read_is_the_same(good, tmp_path):
    recipe = load_recipe(good)
    write_recipe(recipe, tmp_path / "again.yaml")
    again = load_recipe(tmp_path / "again.yaml")
    assert again == recipe
    assert again.hash == recipe.hash


def test_the_hash_follows_the_numbers_and_not_the_name(good):
    recipe = load_recipe(good)
    assert load_recipe(good, ["name=other", "description=words"]).hash == recipe.hash
    for change in ("seeds=[0]", "train.batch_size=65", "prune.0.sparsities=[0.5]", "model.kwargs.widths=[8,8,9]"):
        assert load_recipe(good, [change]).hash != recipe.hash, change


@pytest.mark.parametrize(
    ("old", "new", "line", "key", "words"),
    [
        ("lr: 0.1", "learning: 0.1", 9, "train.optimizer.learning", "unknown key; "),
        ("  duration: 2ep", "  durations: 2ep", 8, "train.durations", "unknown key; nearest: duration"),
        ("seeds: [0, 1]", "seads: [0, 1]", 2, "seads", "unknown key; nearest: seeds"),
        ("[0.0, 0.5]", "[0.0, 1.0]", 20, "prune[0].sparsities[1]", "less than 1, got 1.0"),
        ("[0.0, 0.5]", "[-0.1]", 20, "prune[0].sparsities[0]", "greater than or equal to 0, got -0.1"),
        ("[0.0, 0.5]", "[half]", 20, "prune[0].sparsities[0]", "valid number, .*got 'half'"),
        ("[0.0, 0.5]", "[0.5, 0.5]", 18, "prune[0]", "sparsities repeat a value"),
        ("gamma: 0.5", "gama: 0.5", 15, "methods[1].regularizer", 'unknown parameter .* "gama"; nearest: gamma'),
        ("gamma: 0.5", "gamma: 1.5", 15, "methods[1].regularizer", "1.5"),
        ("name: targeted_dropout", "name: targeted_droput", 15, "methods[1].regularizer", "nearest: targeted_dropout"),
        ("criterion: magnitude", "criterion: magnitud", 19, "prune[0].criterion", "nearest: magnitude"),
        ("criterion: magnitude", "criterion: taylor", 19, "prune[0].criterion", "one score per unit"),
        ("name: digits_cnn", "name: digit_cnn", 6, "model.name", "nearest: digits_cnn"),
        ("granularity: weight", "granularity: wieght", 18, "prune[0]", "nearest: weight"),
        ("duration: 2ep", "duration: 2", 8, "train.duration", "number with a unit"),
        ("duration: 2ep", "duration: 1e999ep", 8, "train.duration", "too long"),
        ("duration: 2ep", "duration: 9e300ep", 8, "train.duration", "longer than anything"),
        ("duration: 2ep", "duration: -1ep", 8, "train.duration", "number with a unit"),
        ("lr: 0.1", "lr: .inf", 9, "train.optimizer.lr", "got inf, expected .* finite"),
        ("lr: 0.1", "lr: .nan", 9, "train.optimizer.lr", "got nan, expected .* finite"),
        ("lr: 0.1", "lr: -1", 9, "train.optimizer.lr", "greater than 0, got -1"),
        ("lr: 0.1", "lr: 2020-01-01", 9, "train.optimizer.lr", "got a "),
        ("lr: 0.1", "lr: !mine 8", 9, "train.optimizer.lr", "got a "),
        ("[0, 1]", "[1, 1]", 1, "recipe", "seeds must be distinct"),
        ("[0, 1]", "[]", 1, "recipe", "seeds must be distinct and at least one"),
        ("label: targeted\n", "label: plain\n", 1, "recipe", "distinct labels"),
        ("method: targeted", "method: targetted", 1, "recipe", "targetted.*known: best, plain, targeted"),
        ("prune: 1,", "prune: 0,", 1, "recipe", "granularity unit"),
        ("prune: 1,", "prune: 7,", 1, "recipe", "granularity unit"),
        ("[onnx]", "[onyx]", 22, "final.exports[0]", "'onnx'.*got 'onyx'"),
        ("{duration: 4it}", "{duration: 4it, precision: bf16-mixed}", 1, "recipe", "precision"),
        ("name: good", "name: ../../etc/passwd", 1, "name", "pattern"),
        ("name: good", f"name: {'x' * 300}", 1, "name", "at most 100"),
        ("gamma: 0.5", "gamma: abc", 15, "methods[1].regularizer", "targeted_dropout: gamma: .*number, got 'abc'"),
        ("gamma: 0.5", "gamma: 1.5", 15, "methods[1].regularizer", "regularizer targeted_dropout: gamma is .*got 1.5"),
        ("- label: plain", "- lable: plain", 12, "methods[0].lable", "unknown key; nearest: label$"),
        ("seeds: [0, 1]", "seeds: [a, b, c]", 2, "seeds[0]", "valid integer.*got 'a'$"),
        ("seeds: [0, 1]", "seeds: 3", 2, "seeds", "expected a list, got 3$"),
        ("granularity: weight", "granularity: 2:1", 18, "prune[0]", "keeps 2 of 1 weights.*as 2:4$"),
        (
            "model: {name: digits_cnn, kwargs: {widths: [8, 8, 8]}}",
            "model: mlp",
            6,
            "model",
            "a mapping of keys, got 'mlp'",
        ),
        ("regularizer: none", "regularizer: [none]", 13, "methods[0].regularizer", "a mapping of keys, got a list"),
        ("seeds: [0, 1]", "seeds: 3\ndescription: [1]\nmodle: 3", 4, "modle", "unknown key; nearest: model, [^()]*$"),
        ('["@last"]', '"@last"', 16, "methods[1].exclude", "expected a list, got '@last'"),
    ],
)
def test_what_is_wrong_is_said_where(good, old, new, line, key, words):
    assert old in GOOD
    good.write_text(GOOD.replace(old, new, 1))
    message = refusal(good)
    assert message.startswith(f"{good}:{line}: {key}: "), message
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "an empty file"),
        (b"# only words\n", "an empty file"),
        (b"[1, 2]\n", "mapping of keys, got a list"),
        (b"word\n", "mapping of keys"),
        (b"name: a\nname: b\n", r":2: not valid YAML: .*duplicate key"),
        (b"name: a\ntrain:\n\tduration: 1ep\n", r":3: not valid YAML"),
        (b"name: [a\n", "not valid YAML"),
        (b"name: \xff\xfe\n", "cannot be read"),
        (b"name: a\0b\n", "cannot be read"),
        (b"\x80\x04\x95 pickle", "cannot be read"),
        (b"name: a\n---\nname: b\n", "not valid YAML"),
        (b"name: a\nseeds: &x\n  - *x\n", r"seeds\[0\]"),
        (b"name: " + b"[" * 400 + b"]" * 400, "deep|recursion"),
        (b"name: a\nseeds: [99999999999999999999999999999e99999]\n", "seeds"),
        (b"name: a\nseeds: [" + b"9" * 5000 + b"]\n", "read|seeds"),
        (b"name: !!python/object/apply:os.system [ls]\n", "name"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(str(path))
    assert re.search(words, message), message
    assert len(message) < 1000


def test_files_that_are_not_there(tmp_path):
    assert "no such recipe file" in refusal(tmp_path / "none.yaml")
    with pytest.raises(UnknownNameError, match='unknown recipe "demmo"; nearest: demo'):
        load_recipe("demmo")
    assert "is a folder; expected a recipe file, or" in refusal(tmp_path)
    (tmp_path / "recipe.yaml").touch()
    assert f"is a folder; expected a recipe file, such as {tmp_path}/recipe.yaml, or" in refusal(tmp_path)


def test_overrides(good):
    recipe = load_recipe(
        good,
        [
            "train.batch_size=32",
            "seeds=[4, 5]",
            "prune.0.sparsities.1=0.75",
            "prune.0.criterion.order=1",
            "methods.0.regularizer=ddrop",
            "methods.1.regularizer.alpha=0.25",
            "final.fine_tune.optimizer.lr=5e-3",
            "data.subset=",
        ],
    )
    assert recipe.train.batch_size == 32
    assert recipe.seeds == (4, 5)
    assert recipe.prune[0].sparsities == (0.0, 0.75)
    assert recipe.prune[0].criterion == {"name": "magnitude", "order": 1}
    assert recipe.methods[0].regularizer == {"name": "ddrop"}
    assert recipe.methods[1].regularizer == {"name": "targeted_dropout", "gamma": 0.5, "alpha": 0.25}
    assert recipe.final is not None
    assert recipe.final.fine_tune is not None
    assert recipe.final.fine_tune.optimizer.lr == 5e-3
    assert recipe.data.subset is None
    assert load_recipe(good, ["final="]).final is None
    assert load_recipe(good, ["final=", "final.prune=1"]).final.prune == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("prune.7.granularity=unit", '"7" is no entry of a list of 2'),
        ("prune.x=1", '"x" is no entry'),
        ("seeds.²=1", '"²" is no entry'),
        ("seeds.0.x=1", "has no key"),
        ("data.validation.x=1", "has no key"),
        ("data.validation.x.y=1", "nothing to set"),
        ("train.batch_size={", "not valid YAML"),
        ("train.batch_size=!!python/name:os.system", "train.batch_size"),
        ("train.batchsize=3", "unknown key; nearest: batch_size"),
        ("a..b=1", "unknown key"),
        (".=1", "unknown key"),
        ("name.x=1", "name"),
    ],
)
def test_overrides_that_make_no_sense(good, text, words):
    assert re.search(re.escape(words) if "²" in words else words, refusal(good, text))


@pytest.mark.parametrize("key", ["methods.0.label=x", "prune.0.granularity=unit", "seeds.0=3"])
def test_an_override_inside_a_list_that_the_recipe_does_not_have(tmp_path, key):
    (tmp_path / "short.yaml").write_text("name: short\n")
    name = key.partition(".")[0]
    expected = f'--set "{key}": the recipe has no {name} to change; list them in the file, or set {name}=[...]'
    assert refusal(tmp_path / "short.yaml", key) == expected


def test_mistakes_in_several_places_are_hinted_at(good):
    assert refusal(good, "train.batch_size=x", "data.subset=y").endswith("got 'y' (and more elsewhere)")


def test_code_runs_only_when_the_caller_says_so(good, tmp_path, monkeypatch):
    (tmp_path / "hostile_module.py").write_text("open('it-ran', 'w')\ndef net(num_classes, in_shape): ...\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for key in ("model.name", "prune.0.criterion", "methods.0.regularizer"):
        message = refusal(good, f"{key}=python:hostile_module:net")
        assert "--allow-code hostile_module" in message
    assert not (tmp_path / "it-ran").exists()
    assert load_recipe(good, ["model.name=python:hostile_module:net"], allow_code=["hostile_module"])
    assert (tmp_path / "it-ran").exists()
    with pytest.raises(RecipeError, match="not a subclass of Criterion"):
        load_recipe(good, ["prune.0.criterion=python:hostile_module:net"], allow_code=["hostile_module"])
    with pytest.raises(RecipeError, match="does not import"):
        load_recipe(good, ["model.name=python:hostile_module:nett"], allow_code=["hostile_module"])


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        [
            *("none", "magnitude", "unit", "2:4", "1ep", "0.5run", "1e400ep", "best", "@last", "python:os:system", "²"),
            *(10**400, -(10**400), math.inf, datetime.date(2020, 1, 1), b"bytes", {1, 2}),
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(0, 2), inner, max_size=3)
    ),
    max_leaves=4,
)


def paths(data: object, at: tuple = ()) -> list[tuple]:
    found = [at] if at else []
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        found += paths(value, (*at, key))
    return found


PARSED = YAML(typ="safe").load(GOOD)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(paths(PARSED)), VALUES | st.just("DELETE")), min_size=1, max_size=2))
@example([(("methods", 1, "regularizer"), {"name": "targeted_dropout", "gamma": 10**400})])
@example([(("methods", 1, "regularizer"), {"name": "ddrop", "keep_min": "low"})])
@example([(("methods", 1, "regularizer"), {"name": ["none"]})])
@example([(("prune", 0, "criterion"), {})])
@example([(("train", "duration"), {"name": "1ep"})])
@example([(("train", "duration"), "\n")])
@example([(("methods", 1, "regularizer"), "\n")])
def test_any_mutation_is_a_recipe_or_a_recipe_error(tmp_path_factory, changes):
    data = copy.deepcopy(PARSED)
    for path, value in changes:
        inner = data
        try:
            for part in path[:-1]:
                inner = inner[part]
            if value == "DELETE":
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue
    file = tmp_path_factory.getbasetemp() / "mutated.yaml"
    with file.open("w", encoding="utf-8") as stream:
        YAML(typ="safe").dump(data, stream)
    try:
        recipe = load_recipe(file)
    except UsageError as error:
        message = str(error)
    else:
        message = f"{file}: {json.dumps(recipe.resolved(), allow_nan=False)} {recipe.hash}"
    assert message.startswith(str(file))
    assert "\n" not in message


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, math.inf])
def test_sparsity_out_of_range_in_the_api(sparsity):
    with pytest.raises(ValidationError):
        PruneSpec(sparsities=(sparsity,))


def test_plugins_by_name():
    assert make_criterion({"name": "magnitude"}).order == 2  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="expected a name"):
        make_criterion({})
    with pytest.raises(UnknownNameError, match="nearest: magnitude"):
        make_criterion({"name": "magnitudes"})
    with pytest.raises(UsageError, match="gamma"):
        make_regularizer({"name": "targeted_dropout", "gamma": "many"})


def test_networks_are_counted_loops_and_rounds_included(tmp_path):
    path = tmp_path / "counted.yaml"
    path.write_text(
        """\
name: counted
seeds: [0, 1]
methods:
  - {label: once}
  - {label: again, loop: {}}
  - {label: rounds, loop: {fraction: 0.2}, prune: [0]}
prune:
  - {granularity: weight, sparsities: [0.0, 0.5, 0.9]}
  - {granularity: unit, sparsities: [0.5]}
"""
    )
    # Once: 1 training, 4 networks. Again: 1 + 3, 4. Rounds: 0.8^11 is the first share below a tenth: 1 + 11, 12.
    assert load_recipe(path).counts() == (2 * (1 + 4 + 12), 2 * (4 + 4 + 12))
