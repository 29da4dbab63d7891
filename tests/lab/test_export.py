"""An exported file computes what its source computes, or it does not exist."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.errors import ExportError, MissingExtraError, StorageError, UsageError
from secateur.lab.export import export_onnx, export_torch, onnx_callable

needs_onnx = pytest.mark.skipif(
    not all(find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")), reason="needs the onnx extra"
)
KINDS = [pytest.param("onnx", marks=needs_onnx), "torch"]


def _conv_net(widths: tuple[int, ...] = (8, 16)) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    before = 3
    for width in widths:
        norm = nn.BatchNorm2d(width)
        # A fresh BatchNorm is the identity: a folding mistake would go unseen.
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        layers += [nn.Conv2d(before, width, 3, padding=1), norm, nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * before, 10))


EXPORTS = {"onnx": export_onnx, "torch": export_torch}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("widths", [(8, 16), (5, 13)], ids=["whole", "pruned"])
def test_export_equals_source_at_unseen_batch_sizes(kind: str, widths, tmp_path: Path, capfd) -> None:
    net = _conv_net(widths)
    net[0].eval()
    flags = [m.training for m in net.modules()]
    x = torch.randn(5, 3, 9, 9)
    target = tmp_path / "deep" / f"net.{'onnx' if kind == 'onnx' else 'pt2'}"
    report = EXPORTS[kind](net, x, target)
    assert report.format == kind
    assert report.bytes == target.stat().st_size
    assert 0 <= report.max_abs_diff <= report.tolerance
    assert len(report.batch_sizes) >= 3
    assert report.versions["torch"] == torch.__version__
    assert [p.name for p in target.parent.iterdir()] == [target.name]
    assert flags == [m.training for m in net.modules()]
    assert capfd.readouterr().out == ""
    seven = torch.randn(7, 3, 9, 9)
    net.eval()
    again = onnx_callable(target) if kind == "onnx" else torch.export.load(target).module()
    with torch.no_grad():
        assert torch.allclose(again(seven), net(seven), atol=1e-4)
    assert str(report.path) in str(report)


class TwoInTwoOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x, y):
        return self.a(x) + self.b(y), self.b(y).relu()


@pytest.mark.parametrize("kind", KINDS)
def test_several_inputs_and_outputs(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "net.bin"
    inputs = (torch.randn(3, 4), torch.randn(3, 2))
    report = EXPORTS[kind](TwoInTwoOut(), inputs, target)
    assert report.max_abs_diff <= report.tolerance
    if kind == "onnx":
        first, second = onnx_callable(target, threads=2)(*inputs)
        assert first.shape == second.shape == (3, 3)


def test_pt2_holds_no_pickle(tmp_path: Path) -> None:
    export_torch(_conv_net(), torch.randn(2, 3, 9, 9), tmp_path / "net.pt2")
    with zipfile.ZipFile(tmp_path / "net.pt2") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    samples = [data for name, data in contents.items() if "sample_inputs" in name]
    assert samples == [b""]
    configs = [json.loads(data) for name, data in contents.items() if name.endswith("_config.json")]
    payloads = [payload for config in configs for payload in config["config"].values()]
    assert len(payloads) >= 2
    assert not any(payload["use_pickle"] for payload in payloads)


class Deceiver(nn.Module):
    """Computes something else once it is being exported."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x) + (0.5 if torch.compiler.is_compiling() else 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_export_is_refused_and_leaves_the_older_file(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "net.bin"
    with pytest.raises(ExportError, match="computes something else") as caught:
        EXPORTS[kind](Deceiver(), torch.randn(2, 4), target)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    target.write_bytes(b"older")
    with pytest.raises(ExportError):
        EXPORTS[kind](Deceiver(), torch.randn(2, 4), target)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"older"]


def test_nan_does_not_pass_for_equal(tmp_path: Path) -> None:
    net = nn.Linear(4, 2)
    nn.init.constant_(net.bias, float("nan"))
    with pytest.raises(ExportError, match="nan"):
        export_torch(net, torch.randn(2, 4), tmp_path / "net.pt2")


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(3, 2, 2) * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_fixed_batch_size_must_be_asked_for(kind: str, tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ExportError, match="dynamic_batch=False") as caught:
        EXPORTS[kind](FixedBatch(), x, tmp_path / "net.bin")
    assert "\n" not in str(caught.value)
    report = EXPORTS[kind](FixedBatch(), x, tmp_path / "net.bin", dynamic_batch=False)
    assert report.batch_sizes == (3,)


def test_missing_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'secateur\[onnx\]'"):
        export_onnx(nn.Linear(4, 2), torch.randn(2, 4), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []


@needs_onnx
def test_telemetry_is_off() -> None:
    with pytest.raises(ExportError, match="does not load"):
        onnx_callable("nowhere.onnx")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


@pytest.mark.parametrize("kind", KINDS)
def test_unwritable_target(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        EXPORTS[kind](nn.Linear(4, 2), torch.randn(2, 4), tmp_path / "file" / "net.bin")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="directory"):
        EXPORTS[kind](nn.Linear(4, 2), torch.randn(2, 4), tmp_path / "folder")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@needs_onnx
def test_foreign_files_and_meta_networks_are_refused(tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"not a network")
    with pytest.raises(ExportError, match="does not load"):
        onnx_callable(tmp_path / "junk.onnx")
    with pytest.raises(UsageError, match="meta"):
        export_torch(nn.Linear(4, 2).to("meta"), torch.randn(2, 4), tmp_path / "net.pt2")
