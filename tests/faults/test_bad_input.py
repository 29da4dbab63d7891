"""Bad input gets one clear line on stderr and the documented exit code, never a traceback, and loses nothing."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from secateur.errors import CheckpointError, NoEffectError, UsageError

QUICK = ("methods=[{label: a}]", "seeds=[0]", "prune=[{sparsities: [0.5]}]", "final=", "train.duration=1ep")


def changes(*assignments: str) -> list[str]:
    return [x for a in assignments for x in ("--set", a)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(answer, code: int, words: str) -> None:  # type: ignore[no-untyped-def]
    """One line on stderr that says `words`, nothing on stdout, and this exit code."""
    assert answer.out == ""
    assert re.fullmatch(r"secateur: [^\n]+\n", answer.err), answer.err
    assert re.search(words, answer.err), answer.err
    assert "Traceback" not in answer.err
    assert answer.code == code


@pytest.mark.parametrize(
    ("assignment", "code", "words"),
    [
        ("methods.0.regularizer=targeted_droput", 2, r"tiny\.yaml:\d+: methods\[0\].regularizer: .*targeted_dropout"),
        ("prune.0.criterion=magnitudo", 2, r"tiny\.yaml:\d+: prune\[0\].criterion: .*nearest: magnitude"),
        ("train.epochs=3", 2, r"train.epochs: unknown key"),
        ("model.name=resnet21", 2, r"tiny\.yaml:\d+: model.name: .*nearest: .*resnet20"),
        ("model.kwargs.width=[8]", 2, 'no argument "width".*nearest: widths'),
        ("model.kwargs.widths=[8]", 2, "widths"),
        ("model.kwargs.widths=[8,8,-8]", 2, "widths"),
        ("model.kwargs.num_classes=3", 2, "num_classes"),
        ("model.name=torchvision:resnet81", 2, "nearest: torchvision:resnet"),
        ("data.name=didgits", 2, 'unknown data set "didgits"; nearest: digits; .*--data-dir'),
        ("data.name=/none/such", 1, "no such folder"),
        ("data.subset=100000", 2, "subset"),
        ("data.validation=1.0", 2, "data.validation"),
        ("prune.0.sparsities=[1.0]", 2, r"prune\[0\].sparsities\[0\]"),
        ("methods.0.exclude=[convolution*]", 2, "convolution"),
        ("methods.0.include=[nothing]", 2, "nothing"),
        ("prune.0.exclude=[nothing]", 2, "nothing"),
        ("prune.1.include=[nothing]", 2, "nothing"),
        ("prune.0.granularity=3:7", 2, "3:7|3 cannot|group"),
        ("train.duration=0ep", 2, "less than one step"),
        ("model.name=python:os:system", 2, "--allow-code os"),
    ],
)
def test_recipes_that_cannot_run(tiny, tmp_path, secateur, monkeypatch, assignment, code, words):
    monkeypatch.delenv("SECATEUR_DATA_DIR", raising=False)
    own = [c for c in QUICK if not (c.startswith("prune") and assignment.startswith("prune.1"))]
    refused(secateur("run", tiny, *changes(*own, assignment), "--out", tmp_path / "runs", "-q"), code, words)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "demmo"], 2, "nearest: demo"),
        (["run", "none.yaml"], 2, "no such recipe file"),
        (["run", "demo", "--device", "cuda", "-q"], 3, "cuda.*--device cpu"),
        (["run", "demo", "--device", "gpu", "-q"], 2, "expected auto, cpu, cuda"),
        (["run", "demo", "--device", "cuda:first", "-q"], 2, "expected auto, cpu, cuda"),
        (["run", "demo", "--seeds", "3-1"], 2, "names 0 seeds"),
        (["run", "demo", "--seeds", "²"], 2, "expected numbers"),
        (["run", "demo", "--seeds", "0-99999999999"], 2, "expected 1 to 10000"),
        (["run", "demo", "--fail-under", "0.5", "--set", "final="], 2, "delivers no network"),
        (["run", "demo", "--threads", "0"], 2, "--threads"),
        (["check", "demo", "--set", "seeds"], 2, "key.path=value"),
        (["methods", "targeted"], 2, "nearest: targeted_dropout"),
        (["report", "none"], 1, "no such file"),
        (["report", "a", "b"], 1, "no such file"),
        (["runs", "--out", "none"], 2, "no such folder"),
        (["verify", "none.safetensors"], 1, "No such file"),
        (["measure", "none.safetensors"], 1, "No such file"),
        (["export", "none.safetensors"], 1, "No such file"),
        (["export", "none.safetensors", "--format", "pdf"], 2, "expected onnx or torch"),
        (["frobnicate"], 2, "frobnicate"),
        (["run"], 2, "Missing argument"),
        (["run", "demo", "--frob"], 2, "--frob.*see secateur run --help"),
    ],
)
def test_commands_that_make_no_sense(tmp_path, secateur, monkeypatch, arguments, code, words):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    monkeypatch.chdir(tmp_path)
    refused(secateur(*arguments), code, words)
    answer = secateur(*arguments, "--json")
    assert answer.code == code
    assert answer.json["error"]["exit_code"] == code
    assert re.search(words, answer.json["error"]["message"])


def arrays(folder: Path, **changed: np.ndarray) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "train_images": rng.integers(0, 256, (60, 8, 8), dtype=np.uint8),
        "train_labels": np.arange(60) % 10,
        "test_images": rng.integers(0, 256, (20, 8, 8), dtype=np.uint8),
        "test_labels": np.arange(20) % 10,
        **changed,
    }
    for name, array in whole.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=True)
    return folder


BAD_DATA: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "labels too large": ({"test_labels": np.arange(20)}, r"test_labels.npy: labels out of range.*0 <= label < 10"),
    "negative labels": ({"train_labels": np.arange(60) % 10 - 1}, "out of range: got min -1"),
    "too few labels": ({"train_labels": np.arange(59) % 10}, "59 labels for 60 images"),
    "labels that are not whole": ({"train_labels": np.zeros(60)}, "float64, expected integers"),
    "python objects": ({"train_labels": np.array([{}] * 60, dtype=object)}, "Python objects"),
    "NaN pixels": ({"train_images": np.full((60, 8, 8), np.nan, np.float32)}, "image 0 has NaN"),
    "other shapes": ({"test_images": np.zeros((20, 9, 9), np.uint8)}, "shaped"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_are_wrong(tiny, tmp_path, secateur, case):
    changed, words = BAD_DATA[case]
    folder = arrays(tmp_path / "data" / "mine", **changed)
    before = contents(folder)
    options = [*changes(*QUICK, "data.name=mine"), "--data-dir", folder.parent, "--out", tmp_path / "runs", "-q"]
    refused(secateur("run", tiny, *options), 1, words)
    assert contents(folder) == before


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", pickle.dumps(os.getcwd)])
def test_arrays_that_are_no_arrays(tiny, tmp_path, secateur, content):
    folder = arrays(tmp_path / "data" / "mine")
    (folder / "train_images.npy").write_bytes(content)
    options = [*changes(*QUICK, "data.name=mine"), "--data-dir", folder.parent, "--out", tmp_path / "runs", "-q"]
    refused(secateur("run", tiny, *options), 1, r"train_images\.npy: not a readable array")


def test_a_run_that_diverges_says_where_and_keeps_what_it_had(tiny, tmp_path, secateur):
    own = changes(*QUICK, "train.optimizer.lr=1e25", "train.checkpoint_every=1it", "train.lr_schedule.name=constant")
    answer = secateur("run", tiny, *own, "--out", tmp_path / "runs", "-q")
    refused(answer, 1, r"step \d|after step \d")
    assert "learning rate" in answer.err
    assert "checkpoint" in answer.err
    again = secateur("run", tiny, *own, "--out", tmp_path / "runs", "-q")
    assert again.code == 1
    assert not [*tmp_path.glob("runs/stages/*/result.json")]


def test_huge_pixels_make_the_loss_not_finite_and_the_run_stop(tiny, tmp_path, secateur):
    images = np.full((60, 8, 8), 1e38, np.float32) * np.random.default_rng(0).choice([-1, 1], (60, 8, 8))
    folder = arrays(
        tmp_path / "data" / "mine", train_images=images.astype(np.float32), test_images=images[:20].astype(np.float32)
    )
    own = changes(*QUICK, "data={name: mine}", "train.optimizer.lr=1e20", "model={name: mlp, kwargs: {hidden: [4]}}")
    answer = secateur("run", tiny, *own, "--data-dir", folder.parent, "--out", tmp_path / "runs", "-q")
    refused(answer, 1, "is (nan|inf) at step|not finite")


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """The finished run's output folder, to damage."""
    return Path(shutil.copytree(finished.out, tmp_path / "runs"))


def damage(files: list[Path], content: bytes | Callable[[bytes], bytes]) -> None:
    assert files
    for file in files:
        file.write_bytes(content(file.read_bytes()) if callable(content) else content)


FOREIGN: dict[str, bytes | Callable[[bytes], bytes]] = {
    "empty": b"",
    "truncated": lambda whole: whole[: len(whole) // 2],
    "pickle": pickle.dumps({"a": os.getcwd}),
    "words": b"these are not weights",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_damaged_weights_of_a_training(finished, copied, secateur, kind):
    damage([*copied.glob("stages/train-*/model.safetensors")], FOREIGN[kind])
    before = contents(copied)
    answer = secateur("run", finished.recipe, *changes("prune.0.sparsities=[0.25]"), "--out", copied, "-q")
    refused(answer, 1, r"model\.safetensors: .*; delete \S+result\.json to redo that stage")
    after = contents(copied)
    assert {name: after[name] for name in before} == before


def test_weights_of_another_network(finished, copied, secateur):
    from secateur.lab.checkpoint import save_tensors

    for file in copied.glob("stages/train-*/model.safetensors"):
        save_tensors(file, {"some.weight": torch.ones(3)}, {})
    answer = secateur("run", finished.recipe, *changes("prune.0.sparsities=[0.25]"), "--out", copied, "-q")
    refused(answer, 1, r"model\.safetensors: belongs to another network .*; delete \S+result\.json to redo that stage")


def test_following_the_advice_redoes_the_stage(finished, copied, secateur):
    damage([*copied.glob("stages/train-*/model.safetensors")][:1], b"damaged")
    again = ["run", finished.recipe, *changes("prune.0.sparsities=[0.25]"), "--out", copied, "-q"]
    (advice,) = re.findall(r"delete (\S+) to redo", secateur(*again).err)
    Path(advice).unlink()
    assert secateur(*again).code == 0


@pytest.mark.parametrize("content", [b"", b'{"rows": ', b"[]", b"\xff"])
def test_a_damaged_stage_result(finished, copied, secateur, content):
    damage([*copied.glob("stages/prune-*/result.json")], content)
    refused(secateur("run", finished.recipe, "--out", copied, "-q"), 1, r"result\.json: .*delete it to redo")


@pytest.mark.parametrize(
    "content", [b'{"schema": 1}', b"[]", b'{"rows": [{}]}', b'{"rows": 3, "latency": 3, "top1": ""}']
)
@pytest.mark.parametrize("kind", ["train", "prune", "final"])
def test_a_stage_result_of_another_shape(finished, copied, secateur, kind, content):
    damage([*copied.glob(f"stages/{kind}-*/result.json")], content)
    words = rf"{kind}-\w+/result\.json: (expected|holds) .*; delete it to redo that stage"
    refused(secateur("run", finished.recipe, "--out", copied, "-q"), 1, words)


@pytest.mark.parametrize("content", [b"", b'{"rows": ', b"[]", b"{}", b"null", b'{"schema": 1}', b"\xff"])
def test_a_damaged_run_result(finished, copied, secateur, content):
    (file,) = copied.glob("tiny-*/result.json")
    page = file.parent / "report" / "report.html"
    before = page.read_bytes()
    file.write_bytes(content)
    for named in (file, file.parent):
        refused(secateur("report", named), 1, rf"{re.escape(str(file))}: .*run the recipe again")
    assert page.read_bytes() == before
    listed = secateur("runs", "--out", copied, "--json")
    assert listed.code == 0
    (row,) = listed.json["runs"]
    assert not row["complete"]
    assert f"{file}: " in row["reason"]
    assert f"incomplete: {file}: " in secateur("runs", "--out", copied).out


def test_a_folder_without_a_result(finished, copied, secateur):
    refused(secateur("report", copied), 1, "expected the folder of a run")
    (file,) = copied.glob("tiny-*/result.json")
    file.unlink()
    refused(secateur("report", file.parent), 1, "not finished, .*run the recipe again")
    assert "not finished" in secateur("runs", "--out", copied, "--json").json["runs"][0]["reason"]


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("command", ["verify", "measure", "export"])
def test_pruned_files_that_are_none(finished, tmp_path, secateur, command, kind):
    file = tmp_path / "pruned.safetensors"
    shutil.copy(finished.pruned, file)
    damage([file], FOREIGN[kind])
    refused(secateur(command, file), 1, r"pruned\.safetensors: ")
    assert [p.name for p in tmp_path.iterdir()] == ["pruned.safetensors"]


def test_a_foreign_safetensors_file(tmp_path, secateur):
    save_file({"a": torch.ones(2)}, tmp_path / "foreign.safetensors")
    refused(secateur("verify", tmp_path / "foreign.safetensors"), 1, "not a pruned network of secateur")


@pytest.mark.parametrize("content", list(FOREIGN.values()), ids=list(FOREIGN))
def test_masks_that_are_none(tmp_path, content):
    from secateur import Masks

    Masks({"w": torch.ones(64, dtype=torch.bool)}).save(tmp_path / "masks")
    damage([tmp_path / "masks"], content)
    with pytest.raises(CheckpointError):
        Masks.load(tmp_path / "masks")


def test_an_output_folder_that_is_a_file(tiny, tmp_path, secateur):
    (tmp_path / "out").write_text("mine")
    refused(secateur("run", tiny, *changes(*QUICK), "--out", tmp_path / "out", "-q"), 1, "cannot write")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_report_into_a_file(finished, tmp_path, secateur):
    (tmp_path / "out").write_text("mine")
    refused(secateur("report", finished.folder, "--out", tmp_path / "out"), 1, "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("command", ["verify", "measure", "export", "report", "run"])
def test_a_folder_in_place_of_a_file(tmp_path, secateur, command):
    answer = secateur(command, tmp_path)
    assert answer.code in (1, 2)
    assert re.fullmatch(r"secateur: [^\n]+\n", answer.err), answer.err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_fills_up_at_any_write(tiny, tmp_path, secateur, monkeypatch, number):
    """Every write in turn fails; a later run with space goes on from there and ends like any other."""
    real, failed = os.fsync, []
    left = [0]

    def full(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            failed.append(True)
            raise OSError(number, os.strerror(number))
        real(descriptor)

    options = ["run", tiny, *changes(*QUICK), "--out", tmp_path / "runs", "-q"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for write in (1, 2, 3, 4, 5):
            left[0] = write
            refused(secateur(*options), 1, rf"cannot write .*{os.strerror(number)}")
    assert len(failed) == 5
    assert not list(tmp_path.rglob("*.partial"))
    assert secateur(*options).code == 0


def can_mount(folder: Path) -> bool:
    return (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True).returncode == 0
    )


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_real_disk_that_is_full_or_read_only(tiny, tmp_path, secateur, kind):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not can_mount(disk):
        pytest.skip("mounting a small disk needs root")
    try:
        (disk / "mine").write_text("precious")
        if kind == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        refused(secateur("run", tiny, *changes(*QUICK), "--out", disk / "runs", "-q"), 1, "cannot (write|use)")
        assert (disk / "mine").read_text() == "precious"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_missing_extra_exits_3_and_says_what_to_install(finished, tmp_path, secateur, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    refused(secateur("export", finished.pruned, "--out", tmp_path / "a.onnx"), 3, r"pip install 'secateur\[onnx\]'")
    assert not [*tmp_path.iterdir()]


def test_timm_that_is_not_installed_exits_3(tiny, tmp_path, secateur, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    own = changes(*QUICK, "model={name: timm:resnet10t}")
    refused(secateur("run", tiny, *own, "--out", tmp_path / "runs", "-q"), 3, r"pip install 'secateur\[timm\]'")


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 2.0, float("nan")])
def test_sparsity_out_of_range_in_the_api(sparsity):
    import secateur

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UsageError):
        secateur.prune_weights(model, sparsity)
    with pytest.raises(UsageError):
        secateur.prune_units_(model, sparsity, torch.randn(4, 8))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_layer_name_that_matches_nothing_in_the_api():
    import secateur

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    with pytest.raises((NoEffectError, UsageError), match="nothing"):
        secateur.find_targets(model, ["nothing"])
    with pytest.raises((NoEffectError, UsageError), match="nothing"):
        secateur.find_targets(model, exclude=["nothing"])


def test_labels_in_brackets_are_words_and_not_markup(tiny, tmp_path, secateur):
    own = changes(*QUICK[1:], "methods=[{label: 'a [/bold] [red]b'}]")
    answer = secateur("run", tiny, *own, "--out", tmp_path / "runs")
    assert answer.code == 0, answer.err
    assert "train a [/bold] [red]b, seed 0" in answer.err
    (file,) = tmp_path.glob("runs/*/result.json")
    assert json.loads(file.read_text())["methods"][0]["label"] == "a [/bold] [red]b"
