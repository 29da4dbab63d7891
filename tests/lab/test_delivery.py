"""What is delivered is what the rows measured; what cannot work is said before training."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from secateur.errors import EquivalenceError, MissingExtraError, NoEffectError, UsageError
from secateur.lab.context import Options
from secateur.lab.recipe_file import load_recipe
from secateur.lab.run import run_recipe

RECIPE = """\
name: delivery
seeds: [0]
data: {name: digits, subset: 200}
model: {name: digits_cnn, kwargs: {widths: [8, 8, 8]}}
train: {duration: 6it, batch_size: 50}
methods: [{label: plain}]
prune: [{granularity: unit, sparsities: [0.5], recalibrate: true}]
final: {method: plain, sparsity: 0.5, align: 1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "delivery.yaml"
    path.write_text(RECIPE)
    return path


def run(recipe: Path, *overrides: str) -> dict:
    options = Options(out=recipe.parent / "runs", device="cpu")
    return run_recipe(load_recipe(recipe, overrides), options)


def test_the_delivered_network_is_the_row_s_network(recipe):
    result = run(recipe)
    (row,) = result["rows"]
    assert result["final"]["accuracy"]["cut"] == row["top1"]
    assert result["final"]["asked_vs_achieved"]["params"]["cut"] == row["params_kept"]


def test_a_failed_delivery_keeps_result_and_report(recipe):
    with (
        mock.patch("secateur.lab.run.run_final", side_effect=EquivalenceError("no proof")),
        pytest.raises(EquivalenceError, match="no proof"),
    ):
        run(recipe)
    (report,) = (recipe.parent / "runs").glob("delivery-*/report/report.html")
    assert report.stat().st_size > 10_000
    assert run(recipe)["final"] is not None


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("methods=[{label: plain, exclude: [nosuch*]}]", NoEffectError, "matches no prunable layer"),
        ("prune.0.include=[nosuch*]", NoEffectError, "matches no prunable layer"),
        ("prune=[{granularity: unit}, {granularity: '2:4', sparsities: [0.5]}]", UsageError, "cannot form 2:4"),
        (
            "methods=[{label: plain, regularizer: ddrop}]|model={name: mlp}",
            NoEffectError,
            r"no prunable norm .*DDrop acts on .*ddrop_scale",
        ),
        ("data.image_size=32", NoEffectError, "resizes image folders only"),
    ],
)
def test_what_cannot_work_is_said_before_training(recipe, override, error, words):
    with pytest.raises(error, match=words):
        run(recipe, *override.split("|"))
    assert not list((recipe.parent / "runs").glob("stages/train-*"))


def test_a_missing_export_library_is_said_before_training(recipe):
    with (
        mock.patch("secateur.lab.run.find_spec", return_value=None),
        pytest.raises(MissingExtraError, match=r"secateur\[onnx\]"),
    ):
        run(recipe, "final.exports=[onnx]")
    assert not list((recipe.parent / "runs").glob("stages/train-*"))


@pytest.mark.parametrize(
    "override",
    [
        "prune=[]",
        "prune.0.sparsities=[]",
        "final.sparsity=0",
        "train.duration=0.4run",
        "prune.0.min_keep=0",
        "prune=[{granularity: '2:4', sparsities: [0.4]}]",
        "prune=[{scope: global, allocation: erk}]",
        "train.optimizer={name: adam, momentum: 0.5}",
    ],
)
def test_what_can_never_work_does_not_validate(recipe, override):
    with pytest.raises(UsageError):
        load_recipe(recipe, [override])
