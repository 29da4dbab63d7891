"""Every command on one small finished run: words for people, and the one JSON object for programs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

COMMANDS = ("demo", "run", "check", "methods", "models", "doctor", "runs", "report", "verify", "measure", "export")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_worth_reading(secateur, command):
    answer = secateur(command, "--help")
    assert answer.code == 0
    assert answer.err == ""
    assert f"secateur {command}" in answer.out
    assert "--json" in answer.out
    if command in ("demo", "run", "check", "methods", "report"):
        assert "Example: secateur" in " ".join(answer.out.split())


def test_help_names_every_command_and_exit_code(secateur):
    answer = secateur("--help")
    for word in (*COMMANDS, "Exit codes", "130"):
        assert word in answer.out
    assert secateur().code == 2


def test_help_shows_defaults_in_brackets(secateur):
    shown = {command: " ".join(secateur(command, "--help").out.replace("│", " ").split()) for command in COMMANDS}
    assert "[default: $SECATEUR_DATA_DIR]" in shown["run"]
    assert "[default: torch's choice]" in shown["run"]
    assert "[default: the run's report folder]" in shown["report"]
    assert "[default: beside the source]" in shown["export"]


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("model.kwargs.width=[8]", 'no argument "width".*nearest: widths'),
        ("methods.1.exclude=[nothing]", 'layer pattern "nothing" matches no prunable layer'),
        ("prune.1.include=[nothing]", 'layer pattern "nothing" matches no prunable layer'),
        ("prune.0={granularity: '2:4', sparsities: [0.5]}", "cannot form 2:4 groups"),
        ("model={name: torchvision:resnet81}", "nearest: torchvision:resnet"),
    ],
)
def test_check_refuses_what_run_would_refuse_of_the_network(secateur, tiny, assignment, words):
    answer = secateur("check", tiny, "--set", assignment)
    assert answer.code == 2
    assert re.search(words, answer.err), answer.err
    assert secateur("check", tiny, "--set", "data={name: mine}").code == 0, "of a folder the shape is not known"


def test_check_refuses_to_choose_by_the_test_set(secateur, tiny):
    answer = secateur("check", tiny, "--set", "data.validation=0", "--set", "train.keep=best")
    assert answer.code == 2
    assert "train.keep chooses by held-out images" in answer.err


def test_check(secateur, tiny):
    answer = secateur("check", tiny)
    assert answer.code == 0
    assert "is valid: 4 trainings, 16 pruned networks, one delivered" in answer.out
    assert answer.err == ""
    data = secateur("check", tiny, "--seeds", "0-2,7", "--set", "final=", "--json").json
    assert data["recipe"]["seeds"] == [0, 1, 2, 7]
    assert data["trainings"] == 8


def test_methods(secateur):
    data = secateur("methods", "--json").json
    names = {row["name"] for row in data["methods"]}
    assert {"targeted_dropout", "ddrop", "dropout", "none", "magnitude", "random", "taylor"} <= names
    listed = secateur("methods").out
    assert all(name in listed for name in names)
    for name in names:
        answer = secateur("methods", name)
        assert answer.code == 0
        assert f"name: {name}" in answer.out
        assert secateur("methods", name, "--json").json["parameters"] is not None


def test_models(secateur):
    data = secateur("models", "--json").json
    names = {row["name"] for row in data["models"]}
    assert {"digits_cnn", "resnet20", "dropnet_a", "vgg11"} <= names
    assert all(name in secateur("models").out for name in names)


def test_doctor(secateur, monkeypatch):
    monkeypatch.setenv("SECATEUR_DATA_DIR", "/somewhere")
    data = secateur("doctor", "--json").json
    assert data["packages"]["torch"]
    assert data["data_dir"] == "/somewhere"
    answer = secateur("doctor")
    assert answer.code == 0
    assert "/somewhere" in answer.out


def test_a_run_prints_its_result_once(finished):
    result = finished.result
    assert len(result["rows"]) == 16
    assert {row["method"] for row in result["rows"]} == {"plain", "units"}
    assert {row["seed"] for row in result["rows"]} == {0, 1}
    for row in result["rows"]:
        assert row["sparsity_got"] == pytest.approx(row["sparsity_asked"], abs=0.02)
        assert row["top1"] == row["correct"] / row["count"]
    final = result["final"]
    assert final["verify"]["max_abs_diff"] <= final["verify"]["tolerance"] * max(1.0, final["verify"]["scale"])
    assert final["accuracy"]["masked"] == final["accuracy"]["cut"]
    assert final["accuracy"]["reloaded"] == final["accuracy"]["fine_tuned"]
    assert final["file"]["reload_max_abs_diff"] < 1e-5
    stored = json.loads((finished.folder / "result.json").read_text())
    assert stored == {k: v for k, v in result.items() if k != "folder"}
    assert (finished.folder / "report" / "report.html").stat().st_size > 10_000


def test_a_second_run_does_nothing_again(finished, secateur):
    before = {p: p.stat().st_mtime_ns for p in finished.out.glob("stages/*/*") if p.name != ".lock"}
    answer = secateur("run", finished.recipe, "--out", finished.out, "--threads", 1)
    assert answer.code == 0
    assert answer.err.count("  kept  ") == 4 + 8 + 1
    assert "  done  " not in answer.err
    assert "report: " in answer.out
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_dry_run(finished, secateur, tmp_path):
    data = secateur("run", finished.recipe, "--out", finished.out, "--dry-run", "--json").json
    assert len(data["stages"]) == 13
    assert all(stage["done"] for stage in data["stages"])
    assert data["folder"] == str(finished.folder)
    more = secateur("run", finished.recipe, "--out", finished.out, "--seeds", "0,5", "-n")
    assert more.code == 0
    assert "6 of 13 stages are done already; nothing was run" in more.err
    secateur("run", finished.recipe, "--out", tmp_path / "none", "-n")
    assert not (tmp_path / "none").exists()


def test_fail_under(finished, secateur):
    options = ["run", finished.recipe, "--out", finished.out, "-q"]
    reached = finished.result["final"]["accuracy"]["fine_tuned"]
    assert secateur(*options, "--fail-under", reached).code == 0
    answer = secateur(*options, "--fail-under", 1.01, "--json")
    assert answer.code == 5
    assert answer.json["name"] == "tiny", "the result is still the one object"
    assert answer.err.startswith("secateur: accuracy of the delivered network is ")


def test_runs(finished, secateur, tmp_path):
    (row,) = secateur("runs", "--out", finished.out, "--json").json["runs"]
    assert row["complete"] is True
    assert row["rows"] == 16
    assert row["folder"] == str(finished.folder)
    assert "tiny-" in secateur("runs", "--out", finished.out).out.replace("\n", "")
    assert secateur("runs", "--out", tmp_path, "--json").json["runs"] == []


def test_report_of_one_run_and_of_several(finished, secateur, tmp_path):
    answer = secateur("report", finished.folder, "--out", tmp_path / "one")
    assert answer.code == 0
    assert answer.out == f"{tmp_path / 'one' / 'report.html'}\n"
    refused = secateur("report", finished.folder, finished.folder)
    assert refused.code == 2
    command = f"secateur report {finished.folder} {finished.folder} --out comparison"
    assert refused.err == f"secateur: several runs: say where their comparison goes, as in: {command}\n"
    data = secateur(
        "report", finished.folder, finished.folder / "result.json", "--out", tmp_path / "two", "--json"
    ).json
    page = Path(data["report"]).read_text()
    assert page.count("tiny") > 2


def test_verify(finished, secateur):
    answer = secateur("verify", finished.pruned)
    assert answer.code == 0
    assert "rebuilt from the file alone" in answer.out
    data = secateur("verify", finished.pruned, "--json").json
    assert data["max_abs_diff"] < 1e-5 * max(1.0, data["scale"])
    assert data["values"] == 20


def test_measure(finished, secateur):
    answer = secateur("measure", finished.pruned, "--rounds", 6, "--json")
    assert answer.code == 0, answer.err
    data = answer.json
    assert data["costs"]["dense"]["params"] > data["costs"]["pruned"]["params"]
    achieved = finished.result["final"]["asked_vs_achieved"]
    assert data["costs"]["pruned"]["params"] == achieved["params"]["cut"]
    assert data["costs"]["dense"]["macs"] == achieved["macs"]["dense"]
    assert data["latency_ratio"]["low"] <= data["latency_ratio"]["median"] <= data["latency_ratio"]["high"]
    shown = secateur("measure", finished.pruned, "--rounds", 6)
    assert "MACs" in shown.out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_export(finished, secateur, tmp_path, kind):
    target = tmp_path / f"net.{kind}"
    data = secateur("export", finished.pruned, "--format", kind, "--out", target, "--json").json
    assert data["max_abs_diff"] < 1e-4
    assert target.stat().st_size == data["bytes"]


def test_an_export_never_overwrites_its_source(finished, secateur, tmp_path):
    file = tmp_path / "pruned.safetensors"
    shutil.copy(finished.pruned, file)
    before = file.read_bytes()
    answer = secateur("export", file, "--out", file)
    assert answer.code == 2
    assert file.read_bytes() == before
