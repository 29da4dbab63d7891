"""Sparse storage: the same network from a smaller file, bit by bit, and one line for every damaged one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from secateur.errors import CheckpointError
from secateur.lab.models.small import mlp
from secateur.surgery import load_pruned, read_pruned_header, save_pruned
from secateur.surgery.inspect import check_pruned
from secateur.surgery.packed import pack, unpack

BUILDER = "secateur.lab.models.small:mlp"
KWARGS: dict[str, Any] = {"hidden": [120, 64], "num_classes": 10, "in_shape": [1, 8, 8]}
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
INTEGERS[torch.float64] = torch.int64


def raw(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(INTEGERS[tensor.dtype])


@settings(deadline=None, max_examples=30)
@given(
    shape=st.lists(st.integers(0, 9), max_size=4),
    dtype=st.sampled_from(list(INTEGERS)),
    sparsity=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_every_bit_comes_back(shape: list[int], dtype: torch.dtype, sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Random bits: subnormals, infinities and NaNs with payloads among them.
    width = torch.iinfo(INTEGERS[dtype])
    bits = torch.randint(width.min, width.max, shape, generator=generator, dtype=INTEGERS[dtype])
    bits[torch.rand(shape, generator=generator) < sparsity] = 0
    bits[torch.rand(shape, generator=generator) < 0.1] = width.min  # -0.0
    tensor = bits.view(dtype)
    stored, kept = pack(tensor)
    again = unpack(stored, kept, shape)
    assert again.shape == tensor.shape
    assert again.dtype == dtype
    assert torch.equal(raw(again), raw(tensor))
    assert len(stored) == -(-tensor.numel() // 8)
    assert len(kept) == int((raw(tensor) != 0).sum())


def test_a_nan_keeps_its_payload_and_zero_its_sign() -> None:
    tensor = torch.tensor([0x7FC0_1234, -0x8000_0000, 0, 1], dtype=torch.int32).view(torch.float32)
    stored, kept = pack(tensor)
    assert stored.tolist() == [0b1101_0000]
    assert kept.view(torch.int32).tolist() == [0x7FC0_1234, -0x8000_0000, 1]
    assert torch.equal(raw(unpack(stored, kept, [2, 2])), raw(tensor))


def test_a_layout_of_its_own_is_packed_in_the_order_of_the_shape() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).t()
    assert torch.equal(unpack(*pack(tensor), tensor.shape), tensor)


@pytest.mark.parametrize(
    ("bits", "kept", "shape", "message"),
    [
        ([128], [1.0], [10**18], "do not fit"),
        ([128], [1.0], [2**40, 2**40], "do not fit"),
        ([128], [1.0], [-8], "integers of at least 0"),
        ([128], [1.0], [8.0], "integers of at least 0"),
        ([128], [1.0], [True, 8], "integers of at least 0"),
        ([128], [1.0], ["8"], "integers of at least 0"),
        ([128], [1.0], [0], "do not fit"),
        ([], [], [3], "do not fit"),
        ([128], [1.0], [9], "do not fit"),
        ([129], [1.0, 1.0], [7], "do not fit"),
        ([128], [1.0, 2.0], [8], "1 bits are set, for 2 kept"),
        ([255], [1.0], [8], "8 bits are set, for 1 kept"),
        ([128], [[1.0]], [8], "one dimension"),
        ([[128]], [1.0], [8], "one dimension"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(bits: Any, kept: Any, shape: list[Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        unpack(torch.tensor(bits, dtype=torch.uint8), torch.tensor(kept), shape)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_other_types_are_refused() -> None:
    with pytest.raises(CheckpointError, match="expected bytes and floating-point"):
        unpack(torch.tensor([128]), torch.tensor([1.0]), [8])
    with pytest.raises(CheckpointError, match="expected bytes and floating-point"):
        unpack(torch.tensor([128], dtype=torch.uint8), torch.tensor([1]), [8])


def sparse_network(sparsity: float = 0.9, dtype: torch.dtype = torch.float32) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = mlp(**KWARGS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                order = torch.rand(parameter.numel(), generator=generator).argsort()
                parameter.view(-1)[order[: round(sparsity * parameter.numel())]] = 0.0
    return model.to(dtype)


def save(path: Path, model: nn.Module, **more: Any) -> Path:
    return save_pruned(path, model, builder=BUILDER, kwargs=KWARGS, plan=[], **more)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(tmp_path / "net.safetensors", sparse_network(), inputs=torch.zeros(1, 1, 8, 8), sparse=True)


def rewrite(path: Path, change: Any) -> Path:
    """The same file with its tensors or its header changed."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as opened:
        header = json.loads(opened.metadata()["secateur"])
    change(tensors, header)
    save_file(tensors, path, metadata={"format": "pt", "secateur": json.dumps(header)})
    return path


@pytest.mark.parametrize("dtype", list(INTEGERS))
def test_a_sparse_file_holds_the_same_network(tmp_path: Path, dtype: torch.dtype) -> None:
    model = sparse_network(dtype=dtype)
    again = load_pruned(save(tmp_path / "net.safetensors", model, sparse=True))
    for name, tensor in model.state_dict().items():
        assert torch.equal(raw(again.state_dict()[name]), raw(tensor))
    assert read_pruned_header(tmp_path / "net.safetensors").packed.keys() == {
        f"{layer}.weight" for layer in ("fc1", "fc2", "head")
    }


def test_size_is_a_bit_a_weight_and_what_is_kept(tmp_path: Path, file: Path) -> None:
    dense = save(tmp_path / "dense.safetensors", sparse_network(), inputs=torch.zeros(1, 1, 8, 8))
    weights = sum(p.numel() for p in sparse_network().parameters() if p.dim() > 1)
    saved = dense.stat().st_size - file.stat().st_size
    expected = 4 * weights * (1 - (1 + 0.1 * 32) / 32)
    assert saved == pytest.approx(expected, abs=3 * 256)


def test_what_does_not_get_smaller_stays_as_it_was(tmp_path: Path) -> None:
    model = sparse_network(0.0)
    plain = save(tmp_path / "plain.safetensors", model)
    asked = save(tmp_path / "asked.safetensors", model, sparse=True)
    for path in (plain, asked):
        with safe_open(path, framework="pt") as opened:
            header = json.loads(opened.metadata()["secateur"])
        assert header["schema"] == 1
        assert "packed" not in header
        assert list(header)[:3] == ["format", "schema", "builder"]
    assert plain.stat().st_size == asked.stat().st_size
    assert load_file(plain).keys() == load_file(asked).keys() == dict(model.named_parameters()).keys()


def test_old_readers_refuse_by_the_schema(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["secateur"])["schema"] == 2


def test_verify_and_measure_read_it(file: Path) -> None:
    from secateur.cli.main import app

    assert check_pruned(file).max_abs_diff == 0.0
    for command in (["verify", str(file)], ["measure", str(file), "--rounds", "6", "--json"]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output


NAME = "fc1.weight"
BITS, KEPT = f"secateur.bits.{NAME}", f"secateur.kept.{NAME}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: h["packed"].update({NAME: [10**15, 10**15]}), "has shape"),
        (lambda t, h: h["packed"].update({NAME: [64, 120]}), "has shape"),
        (lambda t, h: h["packed"].update({NAME: [-120, -64]}), "has shape"),
        (lambda t, h: h["packed"].update({NAME: [120.0, 64]}), "integers of at least 0"),
        (lambda t, h: h["packed"].update({NAME: "120x64"}), "has shape"),
        (lambda t, h: h["packed"].update({NAME: 7}), "malformed"),
        (lambda t, h: h["packed"].update({"nowhere": [1]}), "no parameter of the network"),
        (lambda t, h: h.update(packed=[NAME]), "malformed"),
        (lambda t, h: h.pop("packed"), "malformed"),
        (lambda t, h: h.update(schema=1), "do not fit the network"),
        (lambda t, h: h.update(schema=3), "schema 3, expected"),
        (lambda t, h: h["packed"].pop(NAME), "do not fit the network"),
        (lambda t, h: t.pop(BITS), "lacks"),
        (lambda t, h: t.pop(KEPT), "lacks"),
        (lambda t, h: t.update({KEPT: t[KEPT][:-1].clone()}), "bits are set"),
        (lambda t, h: t.update({KEPT: t[KEPT].int()}), "floating-point"),
        (lambda t, h: t.update({BITS: t[BITS][:-1].clone()}), "do not fit shape"),
        (lambda t, h: t.update({BITS: t[BITS] ^ 1}), "bits are set"),
        (lambda t, h: t.update({BITS: t[BITS].flip(0).contiguous()}), "altered or damaged|answers the stored"),
        (lambda t, h: t.update({KEPT: t[KEPT] * (1 + 1e-6)}), "altered or damaged"),
    ],
)
def test_damaged_files_are_one_line(file: Path, change: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = rewrite(file, change)
    most = []
    zeros = torch.zeros

    def counted(*shape: Any, **more: Any) -> Tensor:
        most.append(int(np.prod(shape[0], dtype=object)) if shape else 0)
        return zeros(*shape, **more)

    monkeypatch.setattr(torch, "zeros", counted)
    with pytest.raises(CheckpointError, match=message) as error:
        load_pruned(path)
    assert "\n" not in str(error.value)
    assert max(most, default=0) <= 120 * 64


def test_one_flipped_bit_of_the_mask_is_caught(file: Path) -> None:
    # One bit goes and its neighbor comes: counts agree, the digest does not.
    def swap(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        flat = np.unpackbits(tensors[BITS].numpy())
        at = int(np.flatnonzero(np.diff(flat.astype(int)) == -1)[0])
        flat[at], flat[at + 1] = 0, 1
        tensors[BITS] = torch.from_numpy(np.packbits(flat))

    rewrite(file, swap)
    with pytest.raises(CheckpointError, match=r"altered or damaged|answers the stored input"):
        load_pruned(file)


@pytest.mark.parametrize("outer", [True, False])
def test_a_header_too_deep_to_read_is_malformed(file: Path, outer: bool) -> None:
    deep = b"[" * 200_000
    inner = json.dumps({"__metadata__": {"secateur": deep.decode()}}).encode()
    text = b'{"a":' + deep if outer else inner
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match="malformed") as error:
        load_pruned(file)
    assert "\n" not in str(error.value)
