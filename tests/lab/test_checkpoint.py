"""Checkpoints come back bit for bit, and whatever else lies in their place is refused in one line."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from secateur.errors import CheckpointError, StorageError
from secateur.lab.checkpoint import (
    load_tensors,
    optimizer_state,
    restore_optimizer,
    save_tensors,
    write_atomically,
)

TENSORS = {
    "weight": torch.tensor([[1.5, -0.0], [float("inf"), float("nan")]]),
    "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    "count": torch.tensor(2**53 + 1),
    "mask": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
    "view": torch.arange(6.0).view(2, 3).t(),
}
VALUES = {"step": 3, "nested": {"list": [1, 2.5, None, "text"]}, "tiny": 1e-300}


def test_what_is_written_is_what_is_read(tmp_path):
    path = tmp_path / "new" / "folder" / "state.safetensors"
    save_tensors(path, TENSORS, VALUES)
    tensors, values = load_tensors(path)
    assert values == VALUES
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert (
            tensors[name].contiguous().view(-1).view(torch.uint8).equal(tensor.contiguous().view(-1).view(torch.uint8))
        )
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]


def test_equal_states_give_equal_files(tmp_path):
    for name in ("a", "b"):
        save_tensors(tmp_path / name, TENSORS, VALUES)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("start", [b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"])
def test_a_header_as_long_as_a_pickle_begins_is_no_pickle(tmp_path, start):
    """Safetensors begins with the length of its header, and 0x0480 bytes is a length like any other."""
    path, wanted = tmp_path / "state", int.from_bytes(start, "little")
    save_tensors(path, {"a": torch.ones(2)}, {"filler": ""})
    missing = wanted - int.from_bytes(path.read_bytes()[:8], "little")
    save_tensors(path, {"a": torch.ones(2)}, {"filler": "x" * missing})
    assert path.read_bytes()[:2] == start
    assert load_tensors(path)[0]["a"].equal(torch.ones(2))


def test_tensors_that_share_memory_are_stored_each_on_its_own(tmp_path):
    weight = torch.randn(4)
    save_tensors(tmp_path / "tied", {"a": weight, "b": weight, "c": weight[1:]}, {})
    tensors, _ = load_tensors(tmp_path / "tied")
    assert tensors["a"].equal(tensors["b"])
    assert tensors["c"].equal(weight[1:])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "state.safetensors"
    save_tensors(path, TENSORS, VALUES)
    return path.read_bytes()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_truncated_or_garbled_files_are_refused_or_read_and_never_crash(tmp_path_factory, whole, data):
    path = tmp_path_factory.getbasetemp() / "garbled.safetensors"
    length = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:length])
    with pytest.raises(CheckpointError, match=r"garbled\.safetensors: "):
        load_tensors(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    position, value = data.draw(st.integers(0, header - 1)), data.draw(st.integers(0, 255))
    path.write_bytes(whole[:position] + bytes([value]) + whole[position + 1 :])
    try:
        load_tensors(path)
    except CheckpointError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("it-ran",))


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_never_loaded(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "state").write_bytes(pickle.dumps({"a": Bomb()}, protocol=protocol))
    with pytest.raises(CheckpointError):
        load_tensors(tmp_path / "state")
    torch.save({"a": Bomb()}, tmp_path / "state")
    with pytest.raises(CheckpointError, match="a pickle"):
        load_tensors(tmp_path / "state")
    assert not (tmp_path / "it-ran").exists()


def test_foreign_files_are_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="not a secateur checkpoint"):
        load_tensors(tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tensors(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tensors(tmp_path)


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "mkdir"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_leaves_the_old_file(tmp_path, monkeypatch, call, number):
    path = tmp_path / "state"
    save_tensors(path, {"a": torch.ones(2)}, {"old": True})
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        if call == "write":
            real = Path.open

            def broken(self: Path, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
                stream = real(self, *args, **kwargs)  # type: ignore[arg-type]
                return _Full(stream, full)

            patch.setattr(Path, "open", broken)
        elif call == "mkdir":
            patch.setattr(Path, "mkdir", full)
        else:
            patch.setattr(os, call, full)
        with pytest.raises(StorageError, match=os.strerror(number)):
            save_tensors(path, {"a": torch.zeros(9)}, {"old": False})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


class _Full:
    """A file on a full disk."""

    def __init__(self, stream, full) -> None:  # type: ignore[no-untyped-def]
        self._stream, self.write = stream, full

    def __enter__(self):  # type: ignore[no-untyped-def]
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def test_a_file_where_a_folder_is_expected(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="choose another --out"):
        write_atomically(tmp_path / "file" / "state", b"x")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_optimizer_state_goes_by_name(tmp_path, kind):
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return model, kind(model.parameters(), lr=0.1, **extra)

    with torch.random.fork_rng():
        model, optimizer = build()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        tensors, values = optimizer_state(model, optimizer)
        save_tensors(tmp_path / "state", tensors, values)
        other, fresh = build()
        restore_optimizer(other, fresh, *load_tensors(tmp_path / "state"))
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert optimizer.state[a].keys() == fresh.state[b].keys(), name
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, fresh.state[b][key])
            assert value.data_ptr() != fresh.state[b][key].data_ptr()
    with pytest.raises(CheckpointError, match='"nobody"'):
        restore_optimizer(other, fresh, {"nobody|momentum": torch.ones(1)}, {})
    with pytest.raises(CheckpointError, match=r"shape \[7\], expected \[4, 3\]"):
        restore_optimizer(other, fresh, {"0.weight|momentum": torch.ones(7)}, {})
