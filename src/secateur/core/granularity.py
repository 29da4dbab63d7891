"""What is removed together: single weights, whole units, blocks, or N of every M.

A granularity turns a parameter-shaped score into one score per *cell* (`pool`) and kept cells back into
a parameter-shaped mask (`expand`). Selection sees only cells.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from secateur.core.targets import Target
from secateur.errors import UnknownNameError, UsageError

__all__ = ["Block", "Granularity", "NofM", "Unit", "Weight", "parse_granularity", "pool_cells"]


def pool_cells(scores: Tensor, how: str) -> Tensor:
    """Reduce the last axis of `scores`: `"sum"`, `"mean"`, `"l1"` or `"l2"`."""
    if how == "sum":
        return scores.sum(-1)
    if how == "mean":
        return scores.mean(-1)
    if how == "l1":
        return scores.abs().sum(-1)
    if how == "l2":
        return scores.double().square().sum(-1).sqrt()
    raise UnknownNameError("pooling", how, ["sum", "mean", "l1", "l2"])


class Granularity(ABC):
    """The shape of what is removed together."""

    @abstractmethod
    def pool(self, target: Target, scores: Tensor, how: str) -> Tensor:
        """Parameter-shaped `scores` to cell scores."""

    @abstractmethod
    def expand(self, target: Target, keep: Tensor) -> Tensor:
        """Kept cells (bool, shaped like `pool`'s result) to a parameter-shaped mask."""


@dataclass(frozen=True)
class Weight(Granularity):
    """Single weights; cells are the parameter itself."""

    def pool(self, target: Target, scores: Tensor, how: str) -> Tensor:
        return scores

    def expand(self, target: Target, keep: Tensor) -> Tensor:
        return keep.reshape(target.shape)

    def __str__(self) -> str:
        return "weight"


@dataclass(frozen=True)
class Unit(Granularity):
    """Whole neurons, filters or channels; cells are `[units]`."""

    def pool(self, target: Target, scores: Tensor, how: str) -> Tensor:
        return pool_cells(target.rows(scores), how)

    def expand(self, target: Target, keep: Tensor) -> Tensor:
        return target.spread(keep).expand(target.shape).contiguous()

    def __str__(self) -> str:
        return "unit"


@dataclass(frozen=True)
class Block(Granularity):
    """Blocks of `rows` units by `columns` weights of the `[units, fan_in]` view; cells are a matrix of blocks."""

    rows: int
    columns: int

    def _split(self, target: Target) -> tuple[int, int]:
        if target.units % self.rows or target.fan_in % self.columns:
            raise UsageError(
                f'layer "{target.module}": {target.units} x {target.fan_in} weights do not divide into '
                f"{self.rows} x {self.columns} blocks; exclude it or choose a block that divides both"
            )
        return target.units // self.rows, target.fan_in // self.columns

    def pool(self, target: Target, scores: Tensor, how: str) -> Tensor:
        down, across = self._split(target)
        blocks = target.rows(scores).reshape(down, self.rows, across, self.columns).transpose(1, 2)
        return pool_cells(blocks.reshape(down, across, -1), how)

    def expand(self, target: Target, keep: Tensor) -> Tensor:
        self._split(target)
        rows = keep.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)
        return target.unrows(rows).contiguous()

    def __str__(self) -> str:
        return f"block:{self.rows}x{self.columns}"


@dataclass(frozen=True)
class NofM(Granularity):
    """At most `n` kept weights in every `m` along the input channels; cells are `[groups, m]`.

    The groups run along the input channels at one kernel position, as sparse tensor cores want them.
    """

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        return 1.0 - self.n / self.m

    def _by_channel(self, target: Target, tensor: Tensor) -> Tensor:
        channels = target.shape[0] // target.groups if target.kind == "conv_transpose" else target.shape[1]
        if channels % self.m:
            raise UsageError(
                f'layer "{target.module}": {channels} channels cannot form {self.n}:{self.m} groups along dim 1 '
                f"({channels} % {self.m} != 0); exclude it in targets or use a block granularity"
            )
        return target.rows(tensor).reshape(target.units, channels, -1).transpose(1, 2)

    def pool(self, target: Target, scores: Tensor, how: str) -> Tensor:
        return self._by_channel(target, scores).reshape(-1, self.m)

    def expand(self, target: Target, keep: Tensor) -> Tensor:
        channels = target.shape[0] // target.groups if target.kind == "conv_transpose" else target.shape[1]
        by_channel = keep.reshape(target.units, -1, channels).transpose(1, 2)
        return target.unrows(by_channel.reshape(target.units, -1)).contiguous()

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def parse_granularity(text: str | Granularity) -> Granularity:
    """Read `"weight"`, `"unit"`, `"block:4x1"` or `"2:4"`.

    Examples:
        >>> parse_granularity("2:4").sparsity
        0.5
    """
    if isinstance(text, Granularity):
        return text
    if text == "weight":
        return Weight()
    if text == "unit":
        return Unit()
    if match := re.fullmatch(r"block:(\d+)x(\d+)", text):
        rows, columns = int(match[1]), int(match[2])
        if rows and columns:
            return Block(rows, columns)
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(match[1]), int(match[2])
        if 0 < n <= m:
            return NofM(n, m)
    raise UnknownNameError("granularity", text, ["weight", "unit", "block:ROWSxCOLUMNS", "N:M"])
