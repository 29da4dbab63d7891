"""One line for a search, and what the other commands make of recipes that explore."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import secateur as sc
from secateur.lab.explore.ask import search_variants

pytest.importorskip("optuna")

MODULE = """\
from torch import nn


def net(num_classes, in_shape, width=12):
    pixels = in_shape[0] * in_shape[1] * in_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, num_classes))
"""
NOISE = """\
name: cells
data: {name: digits, subset: 200}
model: {name: digits_cnn, kwargs: {widths: [4, 6, 8]}}
train: {duration: 1ep, batch_size: 50}
judge: {images: 60}
preset: sp_paper
explore:
  - {kind: noise, title: Where noise pays, sigmas: [0.05], sparsities: [0.5], variants: 2}
"""


@pytest.fixture(scope="module")
def asked(secateur, tmp_path_factory) -> tuple[object, Path]:
    """The one line of a newcomer, on digits, trained here."""
    out = tmp_path_factory.mktemp("asked") / "runs"
    options = ("--objectives", "accuracy,sparsity", "--trials", 6, "--images", 60, "--threads", 1, "--device", "cpu")
    return secateur("search", "dropnet_a", *options, "--out", out), out


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "mynets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    # For the process that rebuilds the file delivered.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(sc.__file__).parents[1])]))
    yield tmp_path
    sys.modules.pop("mynets", None)


def line(answer, code: int, words: str) -> None:  # type: ignore[no-untyped-def]
    """One line on stderr that says `words`, nothing on stdout, and this exit code."""
    assert answer.out == ""
    assert re.fullmatch(r"secateur: [^\n]+\n", answer.err), answer.err
    assert re.search(words, answer.err), answer.err
    assert answer.code == code


def test_the_command_has_help_worth_reading(secateur):
    shown = " ".join(secateur("search", "--help").out.replace("│", " ").split())
    assert "Example: secateur search resnet20 --weights" in shown
    assert "--json" in shown
    assert "[default: train it]" in shown
    assert "search" in secateur("--help").out


def test_a_newcomer_gets_a_front_a_file_and_a_report(asked):
    answer, out = asked
    assert answer.code == 0, answer.err
    assert "6 trials by nsga2, " in answer.out
    assert "of them on the front of accuracy and sparsity" in answer.out
    assert "Delivered: noise of sigma" in answer.out
    assert "no faster (measured: " in answer.out
    report = re.search(r"^report: (.+)$", answer.out, re.MULTILINE)
    assert "The front" in Path(report[1]).read_text()
    (delivered,) = out.glob("stages/explore-*/pruned.safetensors")
    assert list(out.glob("stages/explore-*/point-0.yaml"))
    assert Path(report[1]).parent.parent.parent == out
    assert delivered.is_file()


def test_the_file_is_verified_and_measured_by_the_other_commands(asked, secateur, tmp_path):
    (delivered,) = asked[1].glob("stages/explore-*/pruned.safetensors")
    answer = secateur("verify", delivered, "--json")
    assert answer.code == 0
    assert answer.json["max_abs_diff"] == 0
    data = secateur("measure", delivered, "--rounds", 6, "--json").json
    assert data["costs"]["pruned"]["bytes"] == data["costs"]["dense"]["bytes"], "zeros take their place in memory"
    assert data["file_bytes"] == delivered.stat().st_size < data["costs"]["dense"]["bytes"]
    assert data["costs"]["dense"]["nonzero"] == data["costs"]["dense"]["params"]
    folder = tmp_path / "as a folder"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(delivered.read_bytes())
    assert secateur("measure", folder, "--rounds", 6, "--json").json["file_bytes"] == data["file_bytes"]
    line(secateur("measure", tmp_path), 1, "a folder without model.safetensors; name the file")
    (row,) = (r for r in secateur("measure", delivered, "--rounds", 6).out.splitlines() if r.startswith("bytes, this"))
    assert str(data["file_bytes"]) in row


def test_the_run_is_listed_and_reported_again(asked, secateur):
    (run,) = secateur("runs", "--out", asked[1], "--json").json["runs"]
    assert run["complete"]
    assert run["rows"] == 1
    report = Path(run["folder"]) / "report" / "report.html"
    before = report.read_bytes()
    report.unlink()
    answer = secateur("report", run["folder"])
    assert answer.code == 0
    assert answer.out == f"{report}\n"
    assert len(report.read_bytes()) == pytest.approx(len(before), rel=0.01)
    answer = secateur("report", run["folder"], run["folder"], "--out", asked[1] / "x")
    assert answer.code == 2
    assert answer.err.count("left out, explorations are reported one at a time") == 2
    assert answer.err.splitlines()[-1].startswith("secateur: none of these 2 runs can be compared with others")


def test_a_result_that_is_damaged_is_told(asked, secateur, tmp_path):
    (file,) = asked[1].glob("search-dropnet-a-*/result.json")
    result = json.loads(file.read_text())
    del result["sections"][0]["front"][0]["held_accuracy"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    line(secateur("report", tmp_path / "result.json"), 1, "section .search. .*cannot be read .*run the recipe again")
    (tmp_path / "result.json").write_text(json.dumps({**result, "network": {}}))
    line(secateur("report", tmp_path / "result.json"), 1, "not the result of an exploration")


def test_with_weights_trained_elsewhere(asked, secateur, tmp_path):
    (trained,) = asked[1].glob("stages/train-*/model.safetensors")
    torch.save({"state_dict": load_file(trained)}, tmp_path / "mine.pt")
    options = ["--weights", tmp_path / "mine.pt", "--trials", 2, "--images", 60, "--device", "cpu", "-q", "--json"]
    answer = secateur("search", "dropnet_a", *options, "--out", tmp_path / "runs")
    assert answer.code == 0, answer.err
    assert answer.err == ""
    found = answer.json
    assert found["network"]["trained"] is None
    first = json.loads(next(asked[1].glob("search-*/result.json")).read_text())
    assert found["network"]["held_right"] == first["network"]["held_right"]
    assert len(found["sections"][0]["trials"]) == 2
    assert not list(tmp_path.glob("runs/stages/train-*"))
    # Normalized in another way it is another network.
    other = secateur("search", "dropnet_a", *options, "--mean", "0", "--std", "5", "--out", tmp_path / "runs").json
    assert other["network"]["source"]["data"] != found["network"]["source"]["data"]


def test_code_of_ones_own_runs_only_if_allowed(secateur, code):
    words = ["search", "python:mynets:net", "--trials", 2, "--images", 60, "--device", "cpu", "--out", code / "runs"]
    line(secateur(*words), 2, "pass --allow-code mynets")
    assert "mynets" not in sys.modules
    answer = secateur(*words, "--allow-code", "mynets", "--vary", "units", "--exclude", "@last", "-q", "--json")
    assert answer.code == 0, answer.err
    (section,) = answer.json["sections"]
    assert section["spec"]["vary"] == "units"
    assert section["delivered"]["cut"] is True
    assert section["names"] == ["1.weight"]


def test_the_same_in_python(code):
    found = search_variants(
        "python:mynets:net",
        out=code / "runs",
        device="cpu",
        allow_code=["mynets"],
        objectives=["accuracy", "bytes"],
        trials=3,
        images=60,
        tolerance=0.05,
    )
    (section,) = found["sections"]
    assert len(section["trials"]) == 3
    assert section["front"]
    assert (Path(found["folder"]) / "report" / "report.html").is_file()
    network = sc.load_pruned(section["delivered"]["file"]["path"], allow_code=["mynets"])
    assert sum(p.numel() for p in network.parameters()) == section["delivered"]["costs"]["dense"]["params"]
    with pytest.raises(TypeError, match="objectve"):
        search_variants("digits_cnn", objectve=["accuracy"])


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["digit_cnn"], 2, 'unknown model "digit_cnn"; nearest: digits_cnn'),
        (
            ["digits_cnn", "--objectives", "accuracy"],
            2,
            "objectives: expected at least two, all different, got accuracy",
        ),
        (["digits_cnn", "--objectives", "accuracy,speed"], 2, "objectives: .*got 'speed'"),
        (["digits_cnn", "--objectives", "accuracy,latency", "--vary", "weights"], 2, "zeros among weights make no"),
        (["digits_cnn", "--budget", "10"], 2, 'time "10": expected a number above 0 and s, min or h'),
        (["digits_cnn", "--tolerance", "2"], 2, "tolerance: .*got 2"),
        (["digits_cnn", "--tolerance", "nan"], 2, "tolerance: .*finite"),
        (["digits_cnn", "--trials", "0"], 2, "trials"),
        (["digits_cnn", "--vary", "layers"], 2, "vary: .*got 'layers'"),
        (["digits_cnn", "--mean", "a,b"], 2, r'--mean "a,b": expected numbers with commas between'),
        (["digits_cnn", "--mean", "0.5"], 2, "give weights too"),
        (["digits_cnn", "--weights", "none.pt"], 1, "none.pt: no such file; expected weights"),
        (["digits_cnn", "--weights", "none.pt", "--mean", "0.5"], 2, "mean and std go together"),
        (["digits_cnn", "--weights", "none.pt", "--mean", ".5,.5", "--std", "1,1"], 2, "images have 1 channels"),
        (["digits_cnn", "--exclude", "nothing"], 2, 'layer pattern "nothing" matches no prunable layer'),
        (["digits_cnn", "--images", "359"], 2, "judge.images 359: the test images are 360; leave some"),
        (["digits_cnn", "--data", "didgits"], 2, 'unknown data set "didgits"; nearest: digits'),
        (["digits_cnn", "--data", "cifar10"], 1, "--download"),
        (["digits_cnn", "--objective", "accuracy"], 2, "No such option.*see secateur search --help"),
        ([], 2, "Missing argument .model.; see secateur search --help"),
    ],
)
def test_bad_arguments_get_one_line_before_anything_is_trained(secateur, tmp_path, options, code, words):
    out = ["--out", tmp_path / "runs", "-q", "--device", "cpu", "--data-dir", tmp_path]
    line(secateur("search", *options, *out), code, words)
    assert not list(tmp_path.glob("runs/stages/train-*"))


def test_bad_arguments_as_json(secateur):
    answer = secateur("search", "digits_cnn", "--budget", "ten", "--json")
    assert answer.code == 2
    assert answer.json["error"]["exit_code"] == 2
    assert 'time "ten"' in answer.json["error"]["message"]


def test_weights_of_another_network_are_refused(secateur, tmp_path):
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    (tmp_path / "b.pt").write_bytes(b"no weights")
    for name, words in (("a.safetensors", "not the weights of this .*it lacks"), ("b.pt", "cannot be read as weights")):
        answer = secateur("search", "digits_cnn", "--weights", tmp_path / name, "--out", tmp_path / "runs", "-q")
        line(answer, 1, words)


@pytest.fixture
def cells(tmp_path) -> Path:
    path = tmp_path / "cells.yaml"
    path.write_text(NOISE)
    return path


def test_check_and_dry_run_of_a_recipe_that_explores(secateur, cells, tmp_path):
    answer = secateur("check", cells)
    assert answer.code == 0
    assert "is valid: it explores one network, Where noise pays" in answer.out
    data = secateur("check", cells, "--json").json
    assert data["sections"] == ["Where noise pays"]
    assert data["recipe"]["preset"] == "sp_paper"
    plan = secateur("run", cells, "-n", "--out", tmp_path / "runs", "--json").json
    assert [(s["title"], s["done"]) for s in plan["stages"]] == [
        ("train the network", False),
        ("Where noise pays", False),
    ]
    assert not (tmp_path / "runs").exists(), "a dry run writes nothing"
    line(secateur("check", cells, "--set", "explore.0.sigmas=[-1]"), 2, r"cells\.yaml:8: explore\[0\]\.sigmas\[0\]: ")
    line(secateur("check", cells, "--set", "preset=", "--set", "exclude=[nothing]"), 2, "matches no prunable layer")
    line(secateur("check", cells, "--seeds", "0-2"), 2, "--seeds: this recipe explores one network; set its seed")
    line(secateur("run", cells, "--fail-under", "0.5"), 2, "--fail-under: the recipe delivers no network")


def test_run_of_a_recipe_that_explores(secateur: Callable, cells: Path, tmp_path: Path):
    options = ("--out", tmp_path / "runs", "--device", "cpu", "--threads", 1)
    first = secateur("run", cells, *options)
    assert first.code == 0, first.err
    assert "Where noise pays\n  Noise pays in " in first.out
    assert "done  train the network" in first.err
    again = secateur("run", cells, *options)
    assert again.code == 0
    assert "kept  train the network" in again.err
    assert "kept  Where noise pays" in again.err
    assert again.out == first.out
    (result,) = tmp_path.glob("runs/cells-*/result.json")
    (section,) = json.loads(result.read_text())["sections"]
    assert section["layers"] == ["conv2", "conv3"], "sp_paper spares the first and the last layer"
    states = [s["done"] for s in secateur("run", cells, "-n", *options[:2], "--json").json["stages"]]
    assert states == [True, True]
    fresh = secateur("run", cells, *options, "--no-resume")
    assert "done  Where noise pays" in fresh.err
    assert fresh.out == first.out


def test_a_run_that_is_not_finished_is_listed_as_such(secateur, cells, tmp_path):
    (tmp_path / "runs" / "cells-0").mkdir(parents=True)
    (tmp_path / "runs" / "cells-0" / "recipe.yaml").write_text(NOISE)
    (row,) = secateur("runs", "--out", tmp_path / "runs", "--json").json["runs"]
    assert not row["complete"]
    assert "run the recipe again to go on" in row["reason"]
