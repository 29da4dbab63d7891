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
from secateur.lab.report.page import slug

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
    rows = _read((report / "noise.cells.csv").read_text())
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
    assert {"sensitivity.layers.steps.csv", "analyses.spread.cells.csv"} <= {file.name for file in report.glob("*.csv")}


def test_records_within_records_are_rows(done):
    section = done["sections"][1]
    files = {name: _read(text) for name, text in record_files(section, "s")}
    assert [row["layer"] for row in files["s.layers.csv"]] == [layer["layer"] for layer in section["layers"]]
    rows = files["s.layers.steps.csv"]
    expected = [(layer["layer"], step["sparsity"]) for layer in section["layers"] for step in layer["steps"]]
    assert [(row["layer"], float(row["steps.sparsity"])) for row in rows] == expected
    assert {row["weights"] for row in rows if row["layer"] == "head"} == {str(12 * 10)}


def test_what_columns_hold_and_what_they_do_not():
    section = {
        "title": "not a list",
        "points": [1, 2],
        "spec": [{"left": "out"}],
        "rows": [
            {"a": 1, "b": {"low": 0.1 + 0.2, "high": None}, "c": [1.0, 2.0], "d": 'x, "y"', "f": []},
            {"a": 2, "c": [], "e": [[1, 2], [3]], "f": [{"g": 1}, {"g": 44_781_512.0}], "h": [{"i": 2}]},
        ],
        "race": {"seed": 3, "rungs": [{"images": 20, "alive": 5}]},
        "parts": [{"what": "pairs", "matrix": [[0.5, 0.25], [0.25, 1e-20]]}],
    }
    files = {name: _read(text) for name, text in record_files(section, "s")}
    names = ["s.rows.csv", "s.rows.f.csv", "s.rows.h.csv", "s.race.rungs.csv", "s.pairs.matrix.csv"]
    assert list(files) == names
    first, second = files["s.rows.csv"]
    assert first == {
        "a": "1",
        "b.low": "0.30000000000000004",
        "b.high": "",
        "c.0": "1.0",
        "c.1": "2.0",
        "d": 'x, "y"',
        "e": "",
    }
    assert (second["a"], second["c.0"], json.loads(second["e"])) == ("2", "", [[1, 2], [3]])
    # A record without inner ones has no row there; what names a record is repeated.
    assert files["s.rows.f.csv"] == [{"a": "2", "f.g": "1"}, {"a": "2", "f.g": "44781512.0"}]
    assert files["s.rows.h.csv"] == [{"a": "2", "h.i": "2"}]
    assert files["s.race.rungs.csv"] == [{"images": "20", "alive": "5"}]
    assert [[float(cell) for cell in row.values()] for row in files["s.pairs.matrix.csv"]] == [
        [0.5, 0.25],
        [0.25, 1e-20],
    ]


def test_files_of_sections_with_names_alike_are_apart():
    spread = {"parts": [{"what": "spread", "cells": [{"a": 1}]}]}
    noise = {"cells": [{"a": 2}]}
    # Names of files are made of titles without dots.
    assert {name for name, _ in record_files(spread, slug("inside"))}.isdisjoint(
        name for name, _ in record_files(noise, slug("inside.spread"))
    )
