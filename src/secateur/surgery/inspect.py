"""Looking at a pruned-model file: does it still give its stored answer, and what was it before?"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from secateur.errors import UsageError
from secateur.surgery.builders import find_builder
from secateur.surgery.file import load_pruned, read_pruned_header
from secateur.surgery.stored import answers, stored_inputs

__all__ = ["PrunedCheck", "check_pruned", "example_input", "load_dense"]


@dataclass(frozen=True)
class PrunedCheck:
    """How far a reloaded network is from the answer stored with it.

    Args:
        max_abs_diff: largest absolute difference over all stored output values.
        scale: largest absolute stored value.
        values: how many values were compared.
        params: parameters of the reloaded network.
    """

    max_abs_diff: float
    scale: float
    values: int
    params: int


def check_pruned(path: str | os.PathLike[str], *, allow_code: Collection[str] = ()) -> PrunedCheck:
    """Rebuild the network from its file alone and compare it with the stored answer.

    Raises: `CheckpointError` if it does not load or answers otherwise; `UsageError` if no answer is stored.
    """
    header = read_pruned_header(path)
    if not header.check:
        raise UsageError(f"{path}: no answer is stored to compare with; save it with inputs=")
    model = load_pruned(path, allow_code=allow_code)
    given = answers(model, header.check)
    with safe_open(str(path), framework="pt") as file:
        stored = [file.get_tensor(f"secateur.check.{i}") for i in range(len(given))]
    return PrunedCheck(
        max_abs_diff=max(float((s.double() - g.double()).abs().max()) for s, g in zip(stored, given, strict=True)),
        scale=max(float(s.abs().max()) for s in stored),
        values=sum(s.numel() for s in stored),
        params=sum(p.numel() for p in model.parameters()),
    )


def load_dense(path: str | os.PathLike[str], *, allow_code: Collection[str] = ()) -> nn.Module:
    """The network as it was before the cut, with freshly drawn weights: for comparing cost, not answers."""
    header = read_pruned_header(path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = find_builder(header.builder, allow_code)(**header.kwargs)
    return model.eval()


def example_input(path: str | os.PathLike[str]) -> Tensor:
    """One made-up input of the shape the file's network takes, `[1, ...]`."""
    header = read_pruned_header(path)
    if len(header.check) != 1:
        raise UsageError(f"{path}: expected one stored input shape, got {len(header.check)}; save it with inputs=")
    return stored_inputs(header.check)[0][:1]
