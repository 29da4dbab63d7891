"""The pruned-model file: rebuilt alike in a fresh process, and one clear line for everything else."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from surgery_networks import Tied, randomize_, some_kept
from torch import Tensor, nn

from secateur.errors import CheckpointError, StorageError, UsageError
from secateur.surgery import (
    Plan,
    cut_verified_,
    load_pruned,
    make_plan,
    max_difference,
    read_pruned_header,
    save_pruned,
    trace_groups,
)

ALLOWED = ["surgery_networks", "test_file"]


def tied(width: int = 10) -> nn.Module:
    assert width == 10
    return Tied()


class Rotates(nn.Module):
    """A buffer outside `state_dict`, and a plain tensor that `meta` cannot build."""

    def __init__(self, plain: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("angle", torch.linspace(0, 1, 3), persistent=False)
        self.shift = torch.arange(3.0) if plain else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) * self.angle + self.shift


def pruned(model: nn.Module, inputs: Tensor, seed: int = 0) -> tuple[nn.Module, Plan]:
    randomize_(model)
    groups = trace_groups(model, inputs)
    plan = make_plan(model, groups, some_kept(groups, seed))
    cut_verified_(model, plan, inputs)
    return model, plan


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    inputs = torch.randn(4, 6)
    model, plan = pruned(tied(), inputs)
    return save_pruned(
        tmp_path / "small.safetensors",
        model,
        builder="test_file:tied",
        kwargs={"width": 10},
        plan=plan,
        inputs=inputs,
        extra={"sparsity": 0.5},
    ), model


def rewrite(path: Path, change: Any) -> Path:
    """The same file with its tensors or its header changed."""
    tensors = load_file(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["secateur"])
    change(tensors, header)
    save_file(tensors, path, metadata={"format": "pt", "secateur": json.dumps(header)})
    return path


def test_round_trip_is_exact_and_tied_weights_stay_tied(saved: tuple[Path, nn.Module]) -> None:
    path, model = saved
    again = load_pruned(path, allow_code=ALLOWED)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    assert again.a.weight is again.b.weight
    assert not again.training
    assert max_difference(model, again, torch.randn(5, 6)) == 0.0
    header = read_pruned_header(path)
    assert header.extra == {"sparsity": 0.5}
    assert header.tied == {"b.weight": "a.weight"}
    assert header.versions["torch"] == torch.__version__
    assert os.listdir(path.parent) == [path.name]


def test_two_cuts_replay_in_order(tmp_path: Path) -> None:
    inputs = torch.randn(4, 6)
    model, first = pruned(Rotates(), inputs)
    groups = trace_groups(model, inputs)
    second = make_plan(model, groups, {"a.weight": torch.tensor([True, False, True, True])})
    cut_verified_(model, second, inputs)
    path = save_pruned(tmp_path, model, builder="test_file:Rotates", kwargs={}, plan=[first, second])
    again = load_pruned(tmp_path, allow_code=ALLOWED)
    assert path.name == "model.safetensors"
    assert again.a.out_features == 3
    assert max_difference(model, again, inputs) == 0.0


@pytest.mark.parametrize("plain", [False, True])
def test_what_meta_cannot_build_is_there(tmp_path: Path, plain: bool) -> None:
    inputs = torch.randn(4, 6)
    model, plan = pruned(Rotates(plain), inputs)
    random = torch.get_rng_state()
    path = save_pruned(tmp_path, model, builder="test_file:Rotates", kwargs={"plain": plain}, plan=plan, inputs=inputs)
    again = load_pruned(path, allow_code=ALLOWED)
    assert torch.equal(random, torch.get_rng_state())
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    assert max_difference(model, again, inputs) == 0.0


def test_a_fresh_process_loads_torchvision_and_our_own(tmp_path: Path) -> None:
    from secateur.lab.models import build_model, resolve_builder

    inputs = torch.randn(2, 3, 32, 32)
    expected = {}
    for name in ("torchvision:resnet18", "ddrop_resnet18"):
        builder, kwargs = resolve_builder(name, 10, (3, 32, 32))
        model, plan = pruned(build_model(name, num_classes=10, in_shape=(3, 32, 32)), inputs)
        path = tmp_path / f"{len(expected)}.safetensors"
        save_pruned(path, model, builder=builder, kwargs=kwargs, plan=plan, inputs=inputs)
        with torch.no_grad():
            expected[str(path)] = model.eval()(torch.ones(1, 3, 32, 32)).flatten().tolist()
    script = (
        "import json, sys, torch\nfrom secateur.surgery import load_pruned\n"
        "torch.set_num_threads(1)\n"
        "run = lambda p: load_pruned(p)(torch.ones(1, 3, 32, 32)).flatten().tolist()\n"
        "print(json.dumps({p: run(p) for p in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *expected], capture_output=True, text=True, check=True, timeout=120
    )
    for path, values in json.loads(done.stdout).items():
        assert values == pytest.approx(expected[path], rel=1e-4, abs=1e-4)


def test_code_of_others_runs_only_when_allowed(saved: tuple[Path, nn.Module]) -> None:
    with pytest.raises(UsageError, match='module "test_file", which the caller did not allow'):
        load_pruned(saved[0])


@pytest.mark.parametrize(
    ("builder", "kwargs"),
    [
        ("os:system", {"command": "true"}),
        ("secateur.registry:load_python", {"name": "antigravity:fly"}),
        ("secateur.lab.models.build:load_attribute", {"path": "antigravity:fly"}),
        ("torchvision.models:get_weight", {"name": "ResNet18_Weights.DEFAULT"}),
        ("torchvision.models:resnet18", {"weights": "DEFAULT"}),
        ("timm:create_model", {"model_name": "resnet18", "pretrained": True}),
        ("timm:create_model", {"model_name": "hf-hub:someone/net"}),
        ("timm:create_model", {"model_name": "resnet18", "checkpoint_path": "evil.pth"}),
        ("secateur.lab.models.external:timm_model", {"name": "resnet18", "kwargs": {"pretrained": True}}),
        ("torchvision.models", {}),
    ],
)
def test_unsafe_builders_are_refused(saved: tuple[Path, nn.Module], builder: str, kwargs: dict[str, Any]) -> None:
    path = rewrite(saved[0], lambda tensors, header: header.update(builder=builder, kwargs=kwargs))
    with pytest.raises(UsageError) as error:
        load_pruned(path)
    assert "\n" not in str(error.value)
    assert "antigravity" not in sys.modules


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("unpickled"),))


def test_every_malformed_file_is_one_line(saved: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    content = saved[0].read_bytes()
    torch.save({"a": torch.zeros(2)}, tmp_path / "zip.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    cases = {
        "empty": (b"", "empty"),
        "half": (content[: len(content) // 2], "truncated|malformed"),
        "short": (content[:-10], "truncated"),
        "header": (content[:40], "truncated"),
        "longer": (content + b"xx", "bytes to spare"),
        "pickle": (pickle.dumps(Runs()), "a pickle"),
        "text": (b"hello, this is text", "not a safetensors file"),
        "garbled": (content[:9] + b"!!!!" + content[13:], "malformed"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        for read in (load_pruned, read_pruned_header):
            with pytest.raises(CheckpointError, match=message) as error:
                read(tmp_path / name)
            assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match=r"zip archive, as torch.save writes"):
        load_pruned(tmp_path / "zip.safetensors")
    with pytest.raises(CheckpointError, match="not a pruned network of secateur"):
        load_pruned(tmp_path / "foreign.safetensors")
    with pytest.raises(CheckpointError, match="No such file"):
        load_pruned(tmp_path / "absent.safetensors")
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: h.update(schema=7), "schema 7"),
        (lambda t, h: h.pop("plans"), "header is malformed"),
        (lambda t, h: h.update(fingerprint="0" * 32), "not the one saved"),
        (lambda t, h: h.update(plans=[]), "do not fit the network"),
        (lambda t, h: h["plans"][0].update(fingerprint="0" * 32), "does not fit what test_file:tied builds"),
        (lambda t, h: h["plans"][0]["cuts"][0].__setitem__(2, [99]), "does not fit|malformed|altered"),
        (lambda t, h: h["plans"][0]["cuts"][0].__setitem__(0, "nowhere.weight"), "does not fit"),
        (lambda t, h: h.update(kwargs={"depth": 3}), "fails with TypeError"),
        (lambda t, h: t.pop("head.bias"), "do not fit the network"),
        (lambda t, h: t.update(extra=torch.zeros(1)), "do not fit the network"),
        (lambda t, h: t.pop("a.weight"), "is missing"),
        (lambda t, h: t.update({"head.weight": t["head.weight"] + 1}), "answers the stored input off by"),
        (lambda t, h: t.pop("secateur.check.0"), "0 stored answers for 1 outputs"),
    ],
)
def test_altered_files_are_caught(saved: tuple[Path, nn.Module], change: Any, message: str) -> None:
    path = rewrite(saved[0], change)
    with pytest.raises(CheckpointError, match=message) as error:
        load_pruned(path, allow_code=ALLOWED)
    assert "\n" not in str(error.value)


def test_saving_what_cannot_be_rebuilt_is_refused(tmp_path: Path) -> None:
    inputs = torch.randn(4, 6)
    dense = tied()
    model, plan = pruned(copy.deepcopy(dense), inputs)
    save: dict[str, Any] = {"builder": "test_file:tied", "kwargs": {}}
    with pytest.raises(UsageError, match="do not lead to this Tied"):
        save_pruned(tmp_path / "x", model, plan=[], **save)
    with pytest.raises(UsageError, match="do not lead to this Tied"):
        save_pruned(tmp_path / "x", dense, plan=plan, **save)
    with pytest.raises(UsageError, match="plain JSON"):
        save_pruned(tmp_path / "x", model, plan=plan, extra={"a": {1, 2}}, **save)
    with pytest.raises(UsageError, match="does not build the network that was cut"):
        save_pruned(tmp_path / "x", model, plan=plan, builder="test_file:Rotates", kwargs={})
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fails_is_a_storage_error_and_keeps_the_old_file(
    saved: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = saved
    before = path.read_bytes()
    header = read_pruned_header(path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        save_pruned(path, model, builder=header.builder, kwargs=header.kwargs, plan=header.plans)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    with pytest.raises(StorageError, match="cannot write"):
        save_pruned(path / "below", model, builder=header.builder, kwargs=header.kwargs, plan=header.plans)


def test_half_precision_and_integer_inputs(tmp_path: Path) -> None:
    model, plan = pruned(tied(), torch.randn(4, 6))
    model.bfloat16()
    inputs = torch.randn(4, 6, dtype=torch.bfloat16)
    path = save_pruned(tmp_path, model, builder="test_file:tied", kwargs={}, plan=plan, inputs=inputs)
    assert load_pruned(path, allow_code=ALLOWED).a.weight.dtype == torch.bfloat16
    embedded, cut_plan = pruned(words(), torch.randint(0, 20, (3, 5)))
    path = save_pruned(
        tmp_path / "words", embedded, builder="test_file:words", kwargs={}, plan=cut_plan, inputs=torch.full((3, 5), 19)
    )
    assert read_pruned_header(path).check[0]["below"] == 20
    assert load_pruned(path, allow_code=ALLOWED)[0].embedding_dim == embedded[0].embedding_dim


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))


def test_one_flipped_bit_is_caught(tmp_path: Path) -> None:
    file = tmp_path / "small.safetensors"
    from secateur.lab.models.small import mlp

    kwargs = {"hidden": [3], "num_classes": 2, "in_shape": [1, 2, 2]}
    save_pruned(file, mlp(**kwargs), builder="secateur.lab.models.small:mlp", kwargs=kwargs, plan=[])
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="altered or damaged"):
        load_pruned(file)
