"""The CSV files beside an exploration's page: every record of its result, and nothing else."""

from __future__ import annotations

import csv
import io
import json

import pytest

from secateur.lab.context import Options
from secateur.lab.explore.recipe import ExploreRecipe
from secateur.lab.explore.run import explore
from secateur.lab.report.explore.records import record_files

RECIPE = {
    "name": "small",
    "data": {"subset": 300},
    "model": {"name": "mlp", "kwargs": {"hidden": [12]}},
    "train": {"duration": "2ep"},
    "judge": {"images": 60},
    "explore": [
        {"kind": "noise", "sigmas": [0.01, 0.1], "sparsities": [0.5, 0.9], "variants": 3, "confirm": False},
        {"kind": "sensitivity", "sparsities": [0.5, 0.9]},
        {"kind": "analyses", "what": ["collapse", "spread"], "images": 50, "variants": 2},
    ],
}


def _read(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return explore(ExploreRecipe.model_validate(RECIPE), Options(tmp_path_factory.mktemp("out"), device="cpu"))


def test_every_network_of_a_population_is_in_a_file_beside_the_page(done):
    from pathlib import Path

    report = Path(done["folder"]) / "report"
    rows = _read((report / "noise-cells.csv").read_text())
    cells = done["sections"][0]["cells"]
    assert len(rows) == len(cells) == 4
    for row, cell in zip(rows, cells, strict=True):
        assert float(row["sigma"]) == cell["sigma"]
        found = [float(row[f"accuracies.{seed}"]) for seed in range(3)]
        assert found == pytest.approx(cell["accuracies"], rel=1e-5)
        assert float(row["p_gain"]) == pytest.approx(cell["p_gain"], rel=1e-5)
    page = (report / "report.html").read_text()
    for file in report.glob("*.csv"):
        assert f'<a href="{file.name}">' in page
    assert {"sensitivity-layers.csv", "analyses-spread-cells.csv"} <= {file.name for file in report.glob("*.csv")}


def test_records_within_records_are_rows(done):
    section = done["sections"][1]
    rows = _read(dict(record_files(section, "s"))["s-layers.csv"])
    expected = [(layer["layer"], step["sparsity"]) for layer in section["layers"] for step in layer["steps"]]
    assert [(row["layer"], float(row["steps.sparsity"])) for row in rows] == expected
    assert {row["weights"] for row in rows if row["layer"] == "head"} == {str(12 * 10)}


def test_what_columns_hold_and_what_they_do_not():
    section = {
        "title": "not a list",
        "points": [1, 2],
        "spec": [{"left": "out"}],
        "rows": [
            {"a": 1, "b": {"low": 0.5, "high": None}, "c": [1.0, 2.0], "d": 'x, "y"'},
            {"a": 2, "c": [], "e": [[1, 2], [3]], "f": [{"g": 1}], "h": [{"i": 2}]},
        ],
    }
    ((name, text),) = record_files(section, "s")
    assert name == "s-rows.csv"
    first, second = _read(text)
    assert first == {
        "a": "1",
        "b.low": "0.5",
        "b.high": "",
        "c.0": "1",
        "c.1": "2",
        "d": 'x, "y"',
        **dict.fromkeys(["e", "f", "h"], ""),
    }
    assert (second["a"], second["c.0"]) == ("2", "")
    assert [json.loads(second[column]) for column in "efh"] == [[[1, 2], [3]], [{"g": 1}], [{"i": 2}]]
