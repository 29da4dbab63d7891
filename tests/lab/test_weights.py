"""Weights of others are read as they are found, never run, and never loaded in part."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from secateur.errors import CheckpointError
from secateur.lab.models import build_model
from secateur.lab.weights import load_weights


def _net(width: int = 4) -> torch.nn.Module:
    return build_model(
        "resnet20", num_classes=10, in_shape=(3, 32, 32), kwargs={"widths": [width, width, width]}, seed=width
    )


def _same(a: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3, "best_prec1": 91.7},
        lambda s: {"state_dict": OrderedDict((f"module.{k}", v) for k, v in s.items())},
        lambda s: {"model": {f"_orig_mod.{k}": v for k, v in s.items()}, "optimizer": {"lr": 0.1}},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    ],
)
def test_what_training_programs_save(tmp_path: Path, wrap: object) -> None:
    torch.manual_seed(1)
    source = {k: torch.randn_like(v) if v.is_floating_point() else v + 5 for k, v in _net().state_dict().items()}
    torch.save(wrap(source), tmp_path / "w.th")  # type: ignore[operator]
    network = _net()
    load_weights(network, tmp_path / "w.th")
    assert _same(network, source)


def test_files_without_counts_of_batches(tmp_path: Path) -> None:
    source = {k: v + 1 for k, v in _net().state_dict().items()}
    old = {k: v for k, v in source.items() if not k.endswith("num_batches_tracked")}
    assert len(old) < len(source)
    torch.save(old, tmp_path / "old.th")
    network = _net()
    load_weights(network, tmp_path / "old.th")
    assert _same(network, {**network.state_dict(), **old})
    assert int(network.bn1.num_batches_tracked) == 0  # type: ignore[union-attr,arg-type]


def test_safetensors(tmp_path: Path) -> None:
    source = {k: v + 1 for k, v in _net().state_dict().items()}
    save_file(source, tmp_path / "w.safetensors")
    network = _net()
    load_weights(network, tmp_path / "w.safetensors")
    assert _same(network, source)


class _Runs:
    def __reduce__(self) -> object:
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "holds no state_dict"),
        ({"epoch": 3}, "but epoch"),
        ([1, 2], "but list"),
        ({"a": torch.ones(1)}, "it lacks"),
        ({"state_dict": _Runs()}, "cannot be read as weights"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "w.pt")
    network = _net()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(network, "w.pt")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert _same(network, before)
    assert not Path("ran").exists()


def test_other_widths_missing_names_and_files(tmp_path: Path) -> None:
    torch.save(_net(6).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(CheckpointError, match=r"has shape \[6, 3, 3, 3\], the network's has \[4, 3, 3, 3\]"):
        load_weights(_net(), tmp_path / "wide.pt")
    state = _net().state_dict()
    state["extra"] = torch.ones(1)
    del state["linear.bias"], state["linear.weight"]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(CheckpointError, match=r"it lacks linear\.bias and 1 more; it has besides extra"):
        load_weights(_net(), tmp_path / "part.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        load_weights(_net(), tmp_path / "none.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "wide.pt").read_bytes()[:500])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(_net(), tmp_path / "cut.pt")
