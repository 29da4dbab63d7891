"""Masks as a mapping, on disk, and on a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from secateur.core.masks import Masks
from secateur.errors import CheckpointError, StorageError, UnknownNameError, UsageError


def _masks(*names, seed=0, shape=(4, 3)):
    generator = torch.Generator().manual_seed(seed)
    return Masks({n: torch.rand(shape, generator=generator) < 0.5 for n in names})


def _network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))


def test_counts():
    masks = Masks({"a": torch.tensor([True, False]), "b": torch.zeros(6, dtype=torch.bool)})
    assert (masks.kept, masks.total, masks.sparsity) == (1, 8, 1 - 1 / 8)
    assert masks.layers() == [("a", 1, 2), ("b", 0, 6)]
    assert list(masks) == ["a", "b"]
    assert len(masks) == 2
    assert Masks({}).sparsity == 0.0


def test_only_bools_are_masks():
    with pytest.raises(UsageError, match='mask "a": expected a bool tensor'):
        Masks({"a": torch.ones(2)})


def test_and_or_overlap():
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    one, other = Masks({"w": a, "x": a}), Masks({"w": b, "y": b})
    both = one & other
    assert both["w"].tolist() == [True, False, False, False]
    assert torch.equal(both["x"], a)
    assert torch.equal(both["y"], b)
    either = one | other
    assert list(either) == ["w"]
    assert either["w"].tolist() == [True, True, True, False]
    assert one.overlap(other) == pytest.approx(1 / 3)
    assert one.overlap(one) == 1.0
    assert Masks({"w": a}).overlap(Masks({"w": ~a})) == 0.0


def test_equality():
    assert _masks("a", "b") == _masks("a", "b")
    assert _masks("a", "b") != _masks("a", "b", seed=1)
    assert _masks("a") != _masks("b")
    assert _masks("a") != "a"


def test_apply_zeroes_what_is_not_kept_and_nothing_else():
    network = _network()
    before = copy.deepcopy(network.state_dict())
    mask = _masks("0.weight")["0.weight"]
    Masks({"0.weight": mask}).apply_(network)
    after = network.state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"] * mask)
    assert all(torch.equal(after[n], before[n]) for n in before if n != "0.weight")
    # Even what is not a number becomes exactly zero.
    with torch.no_grad():
        network[0].weight.fill_(float("nan"))
    Masks({"0.weight": torch.zeros(4, 3, dtype=torch.bool)}).apply_(network)
    assert bool((network[0].weight == 0).all())


def test_masks_of_another_network_are_refused():
    with pytest.raises(UnknownNameError, match=r'"0.weigth"; nearest: 0.weight'):
        _masks("0.weigth").apply_(_network())
    with pytest.raises(UsageError, match=r"\[3, 4\] does not fit the parameter \[4, 3\].*cut since"):
        _masks("0.weight", shape=(3, 4)).apply_(_network())


def test_compiled_and_tied_names_are_understood():
    network = _network()
    network[2].weight = nn.Parameter(torch.ones(3, 4))
    compiled = torch.compile(network, backend="eager")
    masks = Masks({"2.weight": torch.zeros(3, 4, dtype=torch.bool)})
    masks.apply_(compiled)
    assert bool((network[2].weight == 0).all())

    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    Masks({"1.weight": torch.eye(4).bool()}).apply_(tied)
    assert int(tied[0].weight.count_nonzero()) == 4


def test_save_and_load(tmp_path):
    masks = _masks("layer.0.weight", "b", shape=(5, 2, 3))
    masks.save(tmp_path / "masks.safetensors")
    loaded = Masks.load(tmp_path / "masks.safetensors")
    assert loaded == masks
    assert set(loaded) == set(masks)
    (tmp_path / "x").mkdir()
    masks.save(tmp_path / "x" / "again.safetensors")
    assert Masks.load(str(tmp_path / "x" / "again.safetensors")) == masks


def test_masks_of_a_transposed_view_survive_saving(tmp_path):
    masks = Masks({"w": (torch.arange(12).reshape(3, 4) % 5 < 2).t()})
    masks.save(tmp_path / "m")
    assert Masks.load(tmp_path / "m") == masks


def test_bad_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="no mask file"):
        Masks.load(tmp_path / "missing")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Masks.load(tmp_path / "text")
    torch.save({"w": torch.ones(2)}, tmp_path / "pickle")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Masks.load(tmp_path / "pickle")
    _masks("w", shape=(100,)).save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Masks.load(tmp_path / "cut")
    from safetensors.torch import save_file

    save_file({"w": torch.ones(3)}, str(tmp_path / "floats"))
    with pytest.raises(CheckpointError, match="not masks"):
        Masks.load(tmp_path / "floats")
    save_file({"w": torch.tensor([0, 1, 7], dtype=torch.uint8)}, str(tmp_path / "bytes"))
    with pytest.raises(CheckpointError, match="not masks"):
        Masks.load(tmp_path / "bytes")


def test_saving_where_nothing_can_be_written(tmp_path):
    with pytest.raises(StorageError, match="cannot write masks"):
        _masks("w").save(tmp_path / "missing" / "masks")
    with pytest.raises(StorageError, match="cannot write masks"):
        _masks("w").save(tmp_path)
