"""Recipes that explore: every mistake is said with file, line and key; what is right survives being written down."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.errors import RecipeError, UsageError
from secateur.lab.explore.ask import search_recipe
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.explore.specs import seconds
from secateur.lab.recipe import Recipe
from secateur.lab.recipe_file import load_any, load_recipe, write_recipe

GOOD = """\
name: good
description: words
data: {name: digits, subset: 300}
model: {name: digits_cnn, kwargs: {widths: [4, 6, 8]}}
judge: {images: 100}
explore:
  - kind: noise
    sigmas: [0.01, 0.1]
    sparsities: [0.5, 0.9]
  - kind: search
    trials: 4
    objectives: [accuracy, sparsity]
  - {kind: deliver, numbers: {sigma: 0.1, sparsity: 0.5}}
"""


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.yaml"
    path.write_text(GOOD)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_any(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("kind: noise", "kind: noize", 7, 'explore[0]: unknown kind "noize"; nearest: noise'),
        ("kind: search", "kind: serach", 10, 'explore[1]: unknown kind "serach"; nearest: search'),
        ("kind: noise", "title: noise", 7, "explore[0]: it has no kind, which says what it is"),
        ("- kind: noise", "- noise\n  - kind: noise", 7, "explore[0]: expected a mapping of keys, got 'noise'"),
        ("sigmas: [0.01", "sigmaz: [0.01", 8, "explore[0].sigmaz: unknown key; nearest: sigmas"),
        ("trials: 4", "trails: 4", 11, "explore[1].trails: unknown key; nearest: trials"),
        ("trials: 4", "xyz: 4", 11, "explore[1].xyz: unknown key; known: title, vary, criterion, variants, kind, obj"),
        ("[0.01, 0.1]", "[0.01, -0.1]", 8, "explore[0].sigmas[1]: input should be greater than or equal to 0, got -0"),
        ("[0.01, 0.1]", "[.inf]", 8, "explore[0].sigmas[0]: got inf, expected text, a finite number"),
        ("[0.01, 0.1]", "[.nan]", 8, "explore[0].sigmas[0]: got nan, expected text, a finite number"),
        ("[0.01, 0.1]", "[much]", 8, "explore[0].sigmas[0]: input should be a valid number"),
        ("[0.01, 0.1]", "0.1", 8, "explore[0].sigmas: expected a list, got 0.1"),
        ("[0.01, 0.1]", "[]", 8, "explore[0].sigmas: expected 1 or more entries, got 0"),
        ("[0.01, 0.1]", "[0.1, 0.1]", 7, "explore[0]: sigmas repeat a value"),
        ("[0.01, 0.1]", "[0]", 7, "explore[0]: sigmas hold only 0, the plain network; give one above 0"),
        ("[0.5, 0.9]", "[]", 9, "explore[0].sparsities: expected 1 or more entries, got 0"),
        ("[0.5, 0.9]", "[0.5, 1.0]", 9, "explore[0].sparsities[1]: input should be less than 1, got 1.0"),
        ("[0.5, 0.9]", "[0.5, 0.5]", 7, "explore[0]: sparsities repeat a value"),
        (
            "kind: noise",
            "kind: noise\n    variants: 0",
            8,
            "explore[0].variants: input should be greater than or equal",
        ),
        (
            "kind: noise",
            "kind: noise\n    crossover: 21",
            8,
            "explore[0].crossover: input should be less than or equal",
        ),
        ("kind: noise", "kind: noise\n    scope: column", 8, "explore[0].scope: input should be 'tensor' or 'global'"),
        ("kind: noise", "kind: noise\n    criterion: magnitud", 8, "explore[0].criterion: unknown criterion"),
        (
            "kind: noise",
            "kind: noise\n    criterion: taylor",
            8,
            "explore[0].criterion: taylor gives one score per unit",
        ),
        ("kind: noise", "kind: noise\n    criterion: learned", 8, "explore[0].criterion: learned needs what training"),
        ("kind: noise", "kind: noise\n    criterion: {name: magnitude, oder: 2}", 8, "nearest: order"),
        ("trials: 4", "trials: 0", 11, "explore[1].trials: input should be greater than or equal to 1, got 0"),
        ("trials: 4", "budget: 10", 11, "explore[1].budget: expected text, got 10"),
        ("trials: 4", "budget: '10'", 11, 'explore[1].budget: time "10": expected a number above 0 and s, min or h'),
        ("trials: 4", "budget: 0min", 11, 'explore[1].budget: time "0min": expected a number above 0'),
        ("trials: 4", "storage: [a]", 11, "explore[1].storage: expected text, got a list"),
        ("trials: 4", "sigma: [0.1, 0.01]", 10, "explore[1]: sigma: expected the lower end first, got [0.1, 0.01]"),
        ("trials: 4", "sparsity: [0.5, 0.5]", 10, "explore[1]: sparsity: expected the lower end first"),
        ("trials: 4", "tolerance: 1.5", 11, "explore[1].tolerance: input should be less than or equal to 1, got 1.5"),
        (
            "accuracy, sparsity",
            "accuracy",
            10,
            "explore[1]: objectives: expected at least two, all different, got accuracy",
        ),
        (
            "accuracy, sparsity",
            "accuracy, accuracy",
            10,
            "explore[1]: objectives: expected at least two, all different, got accuracy",
        ),
        ("accuracy, sparsity", "bytes, sparsity", 10, "explore[1]: objectives must have accuracy among them"),
        (
            "accuracy, sparsity",
            "accuracy, size",
            12,
            "explore[1].objectives[1]: input should be 'accuracy', 'sparsity'",
        ),
        ("accuracy, sparsity", "accuracy, latency", 10, "objective latency does not go with vary weights: zeros"),
        ("trials: 4", "vary: units", None, None),
        ("trials: 4", "vary: layers", 11, "explore[1].vary: input should be 'weights' or 'units', got 'layers'"),
        ("sigma: 0.1, sp", "sigma: -0.1, sp", 13, "explore[2]: numbers: sigma: got -0.1, expected at least 0"),
        ("sparsity: 0.5}", "sparsity: 1}", 13, "explore[2]: numbers: sparsity: got 1, expected"),
        ("sigma: 0.1, sp", "sp", 13, "explore[2]: numbers: expected sigma and sparsity, got sparsity"),
        ("sigma: 0.1, sp", "sigma: .inf, sp", 13, "explore[2].numbers.sigma: got inf"),
        ("kind: search", "kind: search\n    title: noise", 1, 'two sections are called "noise": give each a title'),
        ("judge: {images", "judge: {image", 5, "judge.image: unknown key; nearest: images"),
        ("{images: 100}", "{images: 1}", 5, "judge.images: input should be greater than or equal to 2, got 1"),
        ("{images: 100}", "{source: validation}", 1, "judge.source validation needs a share held out: set data.valid"),
        ("judge:", "preset: sp_papr\njudge:", 5, "preset: input should be 'sp_paper', got 'sp_papr'"),
        ("judge:", "preset: sp_paper\nexclude: [head]\njudge:", 1, "preset sp_paper says which layers are left out"),
        ("judge:", "weights: x.pt\njudge:", 5, "weights: expected a mapping of keys, got 'x.pt'"),
        ("judge:", "weights: {file: x.pt, mean: [0.5]}\njudge:", 5, "weights: mean and std go together"),
        (
            "judge:",
            "weights: {file: x.pt, mean: [0.5], std: [0]}\njudge:",
            5,
            "weights.std[0]: input should be greater",
        ),
        ("judge:", "weights: {file: x.pt}\ntrain: {duration: 3ep}\njudge:", 1, "train trains a network, and weights"),
        ("judge:", "weights: {file: x.pt}\nregularizer: l1\njudge:", 1, "regularizer trains a network, and weights"),
        ("judge:", "regularizer: l11\njudge:", 5, "regularizer: unknown regularizer"),
        ("name: digits_cnn", "name: digit_cnn", 4, 'model.name: unknown model "digit_cnn"; nearest: digits_cnn'),
        ("judge:", "methods: [{label: a}]\njudge:", 5, "methods: unknown key"),
    ],
)
def test_every_mistake_has_its_line(good, old, new, line, words):
    assert old in GOOD
    good.write_text(GOOD.replace(old, new, 1))
    if words is None:
        assert load_any(good).explore[1].vary == "units"
        return
    message = refusal(good)
    assert message.startswith(f"{good}:{line}: "), message
    assert words in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("explore: noise", "explore: expected a list, got 'noise'"),
        ("explore:", "explore: expected a list, got None"),
        ("explore: {kind: noise}", "explore: expected a list, got a mapping"),
        ("explore: []", "explore: expected 1 or more entries, got 0"),
    ],
)
def test_explore_is_a_list(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(f"name: bad\n{text}\n")
    assert words in refusal(path)
    assert f"{path}:2: " in refusal(path)


def test_overrides_reach_into_sections(good):
    recipe = load_any(good, ["explore.0.sigmas=[0.2]", "explore.1.budget=90s", "explore.0.criterion=lamp"])
    assert recipe.explore[0].sigmas == (0.2,)
    assert recipe.explore[0].criterion == {"name": "lamp"}
    assert seconds(recipe.explore[1].budget) == 90.0
    assert '"5" is no entry of a list of 3' in refusal(good, "explore.5.sigmas=[0.2]")
    assert "explore[0].sigmas[0]" in refusal(good, "explore.0.sigmas=[-1]")
    assert "explore[0].sigma: unknown key; nearest: sigmas" in refusal(good, "explore.0.sigma=[1]")


def test_a_resolved_recipe_written_and_read_is_the_same(good, tmp_path):
    changes = [[], ["preset=sp_paper"], ["exclude=[head]"], ["explore.1.budget=10min", "explore.1.sigma=[1.0e-7,1]"]]
    changes.append(["weights={file: x.pt, mean: [0.1], std: [3.0e-5]}"])
    for change in changes:
        recipe = load_any(good, change)
        assert isinstance(recipe, ExploreRecipe)
        write_recipe(recipe, tmp_path / "again.yaml")
        again = load_any(tmp_path / "again.yaml")
        assert again == recipe
        assert again.hash == recipe.hash
        assert ExploreRecipe.model_validate(recipe.resolved()) == recipe


def test_the_hash_follows_the_numbers_and_not_the_name(good):
    first = load_any(good).hash
    assert load_any(good, ["name=other", "description=more"]).hash == first
    changes = ["seed=1", "judge.images=90", "explore.0.sigmas=[0.01]", "explore.1.trials=5", "exclude=[head]"]
    changes += ["preset=sp_paper", "data.subset=200", "explore.2.numbers.sigma=0.2", "explore.0.variants=21"]
    changes += ["weights={file: x.pt}", "train.duration=3ep", "judge.recalibrate=64"]
    assert len({first, *(load_any(good, [change]).hash for change in changes)}) == len(changes) + 1


def test_the_preset_leaves_out_the_first_layer_and_the_last(good):
    assert load_any(good).excluded == ()
    assert load_any(good, ["preset=sp_paper"]).excluded == ("@first", "@last")
    assert load_any(good, ["exclude=[head]"]).excluded == ("head",)


def test_each_loader_takes_its_own(good, tmp_path):
    with pytest.raises(RecipeError, match=r"good\.yaml: it explores variants of one network; expected a recipe that"):
        load_recipe(good)
    assert isinstance(load_any("demo"), Recipe)


def test_times():
    assert [seconds(t) for t in ("90s", "1.5min", "2 h")] == [90.0, 90.0, 7200.0]
    for text in ("10", "min", "-1s", "1e3s", "10 minutes", "", "0s"):
        with pytest.raises(ValueError, match="expected a number above 0 and s, min or h"):
            seconds(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"objectives": ["accuracy"]}, "search: objectives: expected at least two, all different, got accuracy"),
        ({"objectives": "accuracy,sparsity"}, "search: objectives: expected a list of names, got 'accuracy,sparsity'"),
        ({"objectives": ["accuracy", "speed"]}, "objectives: input should be .*got 'speed'"),
        ({"objectives": ["accuracy", "gain"], "vary": "units"}, "search: objective gain does not go with vary units"),
        ({"exclude": "head"}, "search: exclude: expected a list of names, got 'head'"),
        ({"budget": "10"}, 'search: budget: time "10": expected a number above 0 and s, min or h'),
        ({"budget": 10}, "search: budget: input should be a valid string, got 10"),
        ({"trials": 0}, "search: trials: input should be greater than or equal to 1, got 0"),
        ({"tolerance": 2}, "search: tolerance: .*got 2"),
        ({"vary": "layers"}, "search: vary: .*got 'layers'"),
        ({"images": 1}, "search: images: .*got 1"),
        ({"mean": [0.5], "std": [0.5]}, "search: mean and std say how given weights were trained; give weights too"),
        ({"weights": "x.pt", "mean": [0.5]}, "search: mean and std go together"),
        ({"data": 3}, "search: data: .*got 3"),
        ({"model": "digit_cnn"}, "nearest: digits_cnn"),
        ({"model": "python:mine:net"}, "pass --allow-code mine"),
    ],
)
def test_a_question_in_one_line_hears_which_argument_is_wrong(arguments, words):
    with pytest.raises(UsageError, match=words) as caught:
        search_recipe(arguments.pop("model", "digits_cnn"), **arguments)
    assert "{" not in str(caught.value), "a part of the recipe that nobody wrote"


def test_a_question_in_one_line_becomes_a_recipe():
    recipe = search_recipe("resnet20", weights="w.pth", data="cifar10", budget="10min", exclude=["@last"], images=500)
    (section,) = recipe.explore
    assert (section.kind, section.vary, section.budget, section.trials) == ("search", "weights", "10min", None)
    assert (recipe.name, recipe.judge.images, recipe.excluded) == ("search-resnet20", 500, ("@last",))
    assert search_recipe("digits_cnn", objectives=["accuracy", "latency"]).explore[0].vary == "units"
