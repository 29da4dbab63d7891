"""The report says what the rows say, no more; opens anywhere; and refuses what it cannot read."""

from __future__ import annotations

import copy
import csv
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from report_factory import SPARSITIES, make_result

from secateur.errors import CheckpointError, StorageError, UsageError
from secateur.lab.report import summary_lines, write_report
from secateur.lab.report.runs import between
from secateur.lab.report.schema import read_result
from secateur.lab.report.verdict import judge


class Page(HTMLParser):
    """Collects ids, links, scripts and whether every tag is closed."""

    VOID = {"meta", "link", "br", "img", "path", "use", "rect", "circle", "line", "hr", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._note(attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("href", "src", "xlink:href"):
                self.references.append(value or "")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([make_result(3)], tmp_path_factory.mktemp("report"))


def set_top1(result: dict[str, Any], method: str, sparsity: float, correct: list[int]) -> None:
    for row in result["rows"]:
        if row["method"] == method and row["sparsity_asked"] == sparsity and row["granularity"] == "weight":
            row["correct"] = correct[row["seed"]]
            row["top1"] = row["correct"] / row["count"]


def test_page_is_self_contained_and_well_formed(report: Path) -> None:
    text = report.read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    beside = {path.name for path in report.parent.iterdir()}
    for reference in page.references:
        assert reference[1:] in page.ids if reference.startswith("#") else reference in beside, reference
    assert "url(http" not in text
    assert "@import" not in text
    for wanted in ("accuracy-weight", "accuracy-unit", "latency-unit", "training-loss", "training-top1"):
        ElementTree.fromstring((report.parent / f"{wanted}.svg").read_bytes())
        assert (report.parent / f"{wanted}.png").read_bytes().startswith(b"\x89PNG")
    assert not [name for name in beside if name.endswith(".part")]


def test_same_result_makes_the_same_page_and_leaves_matplotlib_as_it_was(report: Path, tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    again = write_report([make_result(3)], tmp_path)
    assert dict(matplotlib.rcParams) == before
    assert again.read_bytes() == report.read_bytes()


def test_csv_holds_means_of_the_rows(report: Path) -> None:
    lines = list(csv.DictReader((report.parent / "table.csv").open()))
    assert len(lines) == 2 * 4 * len(SPARSITIES)
    raw = make_result(3)["rows"]
    for line in lines:
        chosen = [
            row["top1"]
            for row in raw
            if (row["method"], row["granularity"]) == (line["method"], line["granularity"])
            and row["sparsity_asked"] == float(line["sparsity_asked"])
        ]
        assert float(line["top1_mean"]) == pytest.approx(sum(chosen) / 3, abs=1e-5)
        assert float(line["top1_low"]) < float(line["top1_mean"]) < float(line["top1_high"]) + 1e-9
        assert (line["difference"] == "") == (line["method"] == "dense" or line["sparsity_asked"] == "0")


def test_headline_follows_the_numbers() -> None:
    result = make_result(5)
    set_top1(result, "dense", 0.9, [100, 101, 99, 100, 100])
    set_top1(result, "Targeted Dropout", 0.9, [316, 317, 315, 317, 315])
    verdict = judge(read_result(result))
    # 216 of 360 images: 60.0 points on every seed, give or take one image.
    assert verdict.headline.startswith("Targeted Dropout keeps 60.0 points more than magnitude alone at 90 % (95 %")
    assert "5 paired seeds), pruned by weight" in verdict.headline
    assert "largest of 30 comparisons" in verdict.detail
    assert "Holm-corrected" in verdict.detail
    set_top1(result, "dense", 0.9, [340, 341, 339, 340, 340])
    assert "60.0 points" not in judge(read_result(result)).headline


def test_a_loss_is_said_as_a_loss() -> None:
    result = make_result(5)
    set_top1(result, "DDROP", 0.8, [20, 21, 19, 20, 20])
    verdict = judge(read_result(result))
    assert re.search(r"largest loss: DDROP keeps \d+\.\d points less than magnitude alone at 80 %", verdict.detail)
    (item,) = [
        c for c in verdict.comparisons if (c.arm.method, c.sparsity, c.panel.granularity) == ("DDROP", 0.8, "weight")
    ]
    assert item.word == "less"
    assert item.interval.high is not None
    assert item.interval.high < 0


def test_noise_is_not_resolved() -> None:
    claims, rounds = 0, 25
    for at in range(rounds):
        rng, result = np.random.default_rng(at), make_result(3)
        for row in result["rows"]:
            row["correct"] = int(rng.binomial(360, 0.8))
            row["top1"] = row["correct"] / 360
        headline = judge(read_result(result)).headline
        claims += "keeps" in headline
        assert headline.startswith("Not resolved with 3 seeds") or "keeps" in headline
    assert claims <= 4  # 5 % of 25 is 1.25; more than 4 would happen once in 140 times


def test_one_seed_resolves_nothing() -> None:
    lines = summary_lines(make_result(1))
    assert lines[0].startswith("Not resolved with 1 seed")
    assert "an interval needs at least 2 seeds" in lines[0]
    assert not [line for line in lines if " keeps " in line]


def test_picked_from_more_is_corrected_more() -> None:
    verdict = judge(read_result(make_result(3)))
    for item in verdict.comparisons:
        assert item.interval.p is not None
        assert item.interval.p <= item.own <= item.all <= 1
        assert item.family == 2 * 3 * 5
        assert item.sparsities == 5


def test_without_a_control_there_is_no_verdict() -> None:
    result = make_result(2)
    result["methods"][0]["regularizer"] = "something"
    assert judge(read_result(result)).headline.startswith("No verdict")


def test_within_one_point() -> None:
    result = make_result(3)
    for sparsity in SPARSITIES:
        set_top1(result, "dense", sparsity, [350] * 3)
        set_top1(result, "DDROP", sparsity, [350 if sparsity <= 0.7 else 300] * 3)
        set_top1(result, "dropout", sparsity, [350 if sparsity == 0 else 300] * 3)
    for row in result["rows"]:
        if row["sparsity_asked"] == 0:
            row["correct"], row["top1"] = 350, 350 / 360
    text = "\n".join(line for section in judge(read_result(result)).sections for line in section.lines)
    assert "DDROP stays within 1 point of unpruned dense up to 70 %: 0.0 points there" in text
    assert "dropout is more than 1 point below unpruned dense at every sparsity tried, from 50 % on" in text


def test_best_where_it_was_trained_to_be_pruned() -> None:
    result = make_result(3)
    for sparsity in SPARSITIES:
        set_top1(result, "dense", sparsity, [350] * 3)
        set_top1(result, "DDROP", sparsity, [350 if sparsity == 0.7 else 300] * 3)
    for row in result["rows"]:
        if row["sparsity_asked"] == 0:
            row["correct"], row["top1"] = 350, 350 / 360
    text = "\n".join(line for section in judge(read_result(result)).sections for line in section.lines)
    assert "DDROP is within 1 point of unpruned dense at 70 %, not at every lower one: 0.0 points there" in text


def test_summary_names_asked_achieved_and_proof() -> None:
    text = "\n".join(summary_lines(make_result(3)))
    assert "Sparsity asked 50 %, achieved 50.00 % of the targets" in text
    assert "Parameters: 10,314 -> 2,702 (3.82x smaller)" in text
    assert "9.5e-07 (within tolerance 0.0001)" in text
    assert "1.79x faster (95 % interval 1.70..1.88)" in text
    broken = make_result(3)
    broken["final"]["verify"]["max_abs_diff"] = 0.5
    broken["final"]["latency"]["ratio"] = {"median": 1.1, "low": 0.9, "high": 1.3}
    text = "\n".join(summary_lines(broken))
    assert "ABOVE tolerance" in text
    assert "not resolved: 1.10x" in text


def test_missing_measurements_are_said(tmp_path: Path) -> None:
    result = make_result(2)
    for key in ("final", "provenance", "recipe", "created", "wall_seconds", "trainings", "recipe_hash"):
        result[key] = None
    for row in result["rows"]:
        for key in ("latency", "layers", "macs", "params_kept", "params_total", "sparsity_got", "count", "correct"):
            row.pop(key)
    text = write_report([result], tmp_path).read_text("utf-8")
    for what in ("Latency", "Final network", "Density by layer", "Training curves"):
        assert f"{what}: not measured" in text
    assert "None" not in re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", text, flags=re.DOTALL)
    assert any(line.startswith("Final network: none") for line in summary_lines(result))
    emptied = make_result(2)
    emptied["final"] = {"method": "DDROP", "latency": {}, "verify": None, "exports": None, "file": {}}
    assert any("Proof of the cut: not measured" in line for line in summary_lines(emptied))


def test_any_label_is_text(tmp_path: Path) -> None:
    labels = dict(
        zip(
            ("dense", "dropout", "Targeted Dropout", "DDROP"),
            ("<script>alert(1)</script>", 'a $x^2$ & "b"', "_hidden", "剪定 naïve \x07" + "x" * 70),
            strict=True,
        )
    )
    result = make_result(2)
    for part in (result["methods"], result["rows"], result["trainings"], [result["final"]]):
        for item in part:
            for key in ("method", "label"):
                if key in item:
                    item[key] = labels[item[key]]
    result["name"] = "<b>../../name"
    page = write_report([result], tmp_path / "out").read_text("utf-8")
    assert Page(page).open == []
    assert "<script" not in page
    assert "<b>" not in page
    assert "_hidden" in page
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    root = ElementTree.fromstring((tmp_path / "out" / "accuracy-unit.svg").read_bytes())
    drawn = " ".join(root.itertext())
    for label in ("<script>alert(1)</script>", 'a $x^2$ & "b"', "_hidden", "剪定"):
        assert label in drawn


def test_several_runs_are_compared(tmp_path: Path) -> None:
    first, second = make_result(3), make_result(3, rng_seed=8)
    set_top1(first, "dense", 0.9, [60, 61, 60])
    set_top1(second, "dense", 0.9, [180, 182, 179])
    text = write_report([first, second], tmp_path).read_text("utf-8")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert "Differences between runs" in text
    assert "paired by seed; Holm-corrected over 48 comparisons" in text
    assert "+33.3" in text  # (180 + 182 + 179 - 60 - 61 - 60) / 3 of 360 images
    assert len(list(tmp_path.glob("*accuracy-weight.png"))) == 2


def test_runs_on_other_test_sets_are_not_paired() -> None:
    first, other = read_result(make_result(3)), read_result(make_result(3, count=500))
    table, note = between([("first", first), ("other", other)])
    assert table is None
    assert note.startswith("Nothing to pair with first")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema=7), "schema: got 7, expected 1"),
        (lambda r: r.pop("methods"), "methods: field required"),
        (lambda r: r["rows"][3].update(top1="0.9"), r"rows\[3\]\.top1: got '0\.9'"),
        (lambda r: r["rows"][3].update(top1=93.0), r"rows\[3\]\.top1: got 93\.0"),
        (lambda r: r["rows"][3].update(top1=float("nan")), r"rows\[3\]\.top1: got nan"),
        (lambda r: r["rows"][3].update(correct=1), r"rows\[3\]: .*correct / count"),
        (lambda r: r["rows"][3].update(sparsity_asked=1.0), r"rows\[3\]\.sparsity_asked: got 1\.0"),
        (lambda r: r["rows"][3].update(method="nobody"), r'rows\[3\]\.method: got "nobody"'),
        (lambda r: r["rows"].append(copy.deepcopy(r["rows"][3])), r"rows\[48\].*as rows\[3\]"),
        (lambda r: r["final"]["exports"][1].update(bytes=[]), r"final\.exports\[1\]\.bytes"),
        (lambda r: r["rows"].clear(), "rows: got"),
    ],
)
def test_malformed_results_name_the_place(change: Any, message: str, tmp_path: Path) -> None:
    result = make_result(1)
    change(result)
    with pytest.raises(CheckpointError, match=message) as caught:
        write_report([result], tmp_path / "never")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "never").exists()


def test_unwritable_and_empty(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results"):
        write_report([], tmp_path)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        write_report([make_result(1)], tmp_path / "file")


def test_a_full_disk_leaves_the_old_report(report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(report.parent, tmp_path / "copy")
    path = tmp_path / "copy" / "report.html"
    before = path.read_bytes()

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        write_report([make_result(2)], path.parent)
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".*.part"))
