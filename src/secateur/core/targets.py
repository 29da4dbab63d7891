"""Which parameters may be pruned, in what order, and along which axis their units lie.

A *unit* is a neuron, filter or channel: one output of a layer. `Target.rows` shows any prunable weight as
a matrix with one row per unit, so that no other file needs to know how a layer type stores its weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.errors import NoEffectError, UsageError, nearest

__all__ = ["Target", "Targets", "find_targets", "unwrap"]

Kind = Literal["linear", "conv", "conv_transpose", "attention", "norm"]

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Target:
    """One prunable parameter.

    Args:
        name: parameter name in the model, e.g. `"layer1.0.conv1.weight"`.
        module: path of the module that owns it, `"layer1.0.conv1"`.
        kind: layer family; decides where the units lie.
        shape: shape of the parameter.
        groups: convolution groups; 1 elsewhere.
        blocks: units are ranked inside this many equal, contiguous blocks (attention: one for each of
            query, key, value and head); 1 elsewhere.
        bias: name of the bias with one entry per unit, if there is one.
        aliases: other names of the same tied tensor.
    """

    name: str
    module: str
    kind: Kind
    shape: tuple[int, ...]
    groups: int = 1
    blocks: int = 1
    bias: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def units(self) -> int:
        """Number of units (rows of `rows`)."""
        return self.shape[1] * self.groups if self.kind == "conv_transpose" else self.shape[0]

    @property
    def unit_axis(self) -> int:
        """Axis of the parameter along which its units lie (within a group, for transposed convolutions)."""
        return 1 if self.kind == "conv_transpose" else 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def fan_in(self) -> int:
        """Weights in one unit."""
        return self.numel // self.units

    def rows(self, tensor: Tensor) -> Tensor:
        """`tensor`, shaped like the parameter, as `[units, fan_in]`; a view except for transposed convolutions.

        For a transposed convolution with `g` groups, `[in, out/g, *k]`, unit `j` of group `i` is row
        `i * out/g + j`.
        """
        if self.kind != "conv_transpose":
            return tensor.reshape(self.units, -1)
        per_group = tensor.reshape(self.groups, self.shape[0] // self.groups, self.shape[1], -1)
        return per_group.transpose(1, 2).reshape(self.units, -1)

    def unrows(self, rows: Tensor) -> Tensor:
        """Inverse of `rows`: `[units, fan_in]` back to the parameter's shape."""
        if self.kind != "conv_transpose":
            return rows.reshape(self.shape)
        per_group = rows.reshape(self.groups, self.shape[1], self.shape[0] // self.groups, -1)
        return per_group.transpose(1, 2).reshape(self.shape)

    def spread(self, per_unit: Tensor) -> Tensor:
        """One value per unit, `[units]`, shaped to broadcast against the parameter (full size for transposed)."""
        if self.kind != "conv_transpose":
            return per_unit.reshape(-1, *([1] * (len(self.shape) - 1)))
        return self.unrows(per_unit[:, None].expand(-1, self.fan_in))


class Targets(Sequence[Target]):
    """An ordered, named collection of `Target`s (definition order of the model)."""

    def __init__(self, items: Sequence[Target]) -> None:
        self._items = tuple(items)
        self._by_name = {name: t for t in self._items for name in (t.name, *t.aliases)}

    def __getitem__(self, key: int | str) -> Target:  # type: ignore[override]
        return self._by_name[key] if isinstance(key, str) else self._items[key]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Target]:
        return iter(self._items)

    def __repr__(self) -> str:
        return f"Targets({[t.name for t in self._items]})"

    @property
    def names(self) -> list[str]:
        return [t.name for t in self._items]

    def tensors(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters themselves, by target name, taken from `model`."""
        model = unwrap(model)
        return {t.name: model.get_parameter(t.name) for t in self._items}


def unwrap(model: nn.Module) -> nn.Module:
    """The module itself, from inside `torch.compile`'s or a data-parallel wrapper."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def find_targets(
    model: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    kind: Literal["weight", "norm"] = "weight",
) -> Targets:
    """Every prunable parameter of `model`, in definition order, tied tensors once.

    Args:
        model: any network; wrappers of `torch.compile` and data parallelism are looked through.
        include, exclude: shell patterns for module paths or parameter names (`"layer1.*"`); `"@first"` and
            `"@last"` mean the first and last prunable parameter in definition order.
        kind: `"weight"` for weights of linear, convolution (grouped, transposed) and attention layers;
            `"norm"` for the scale (gamma) of BatchNorm layers, one value per unit.

    Raises:
        NoEffectError: a pattern matches nothing, or nothing is left.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        >>> find_targets(net, exclude=["@last"]).names
        ['0.weight']
    """
    everything = _tie(model, list(_candidates(unwrap(model), kind)))
    if not everything:
        raise NoEffectError(f"{type(unwrap(model)).__name__} has no prunable {kind} parameter; nothing to do")
    included = {t.name for pattern in include for t in _matches(pattern, everything)}
    excluded = {t.name for pattern in exclude for t in _matches(pattern, everything)}
    chosen = [t for t in everything if t.name in included - excluded]
    if not chosen:
        raise NoEffectError(f"no target left: include={list(include)} minus exclude={list(exclude)} is empty")
    return Targets(chosen)


def _candidates(model: nn.Module, kind: str) -> Iterator[Target]:
    for path, module in model.named_modules(remove_duplicate=False):
        if kind == "norm":
            if isinstance(module, _BATCH_NORM) and module.affine:
                yield _target(path, module, "weight", "norm")
        elif isinstance(module, nn.MultiheadAttention):
            for attribute in _ATTENTION_WEIGHTS:
                if getattr(module, attribute) is not None:
                    projections = 3 if attribute == "in_proj_weight" else 1
                    yield _target(path, module, attribute, "attention", blocks=projections * module.num_heads)
        elif isinstance(module, nn.Linear):
            yield _target(path, module, "weight", "linear")
        elif isinstance(module, _CONV):
            yield _target(path, module, "weight", "conv", groups=module.groups)
        elif isinstance(module, _CONV_TRANSPOSE):
            yield _target(path, module, "weight", "conv_transpose", groups=module.groups)


def _target(path: str, module: nn.Module, attribute: str, kind: Kind, groups: int = 1, blocks: int = 1) -> Target:
    prefix = path + "." if path else ""
    if parametrize.is_parametrized(module, attribute):
        raise UsageError(
            f'layer "{path}": its {attribute} is parametrized, so it is not a plain parameter to prune; '
            "remove the parametrization first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    bias = "in_proj_bias" if attribute == "in_proj_weight" else "bias"
    has_bias = getattr(module, bias, None) is not None and attribute in ("weight", "in_proj_weight")
    return Target(
        name=prefix + attribute,
        module=path,
        kind=kind,
        shape=tuple(getattr(module, attribute).shape),
        groups=groups,
        blocks=blocks,
        bias=prefix + bias if has_bias else None,
    )


def _tie(model: nn.Module, targets: list[Target]) -> list[Target]:
    """Merge targets that are one tensor under several names; the first name stays."""
    first: dict[int, int] = {}
    merged: list[Target] = []
    parameters = dict(unwrap(model).named_parameters(remove_duplicate=False))
    for target in targets:
        identity = id(parameters[target.name])
        if identity in first:
            owner = merged[first[identity]]
            merged[first[identity]] = Target(
                **{**owner.__dict__, "aliases": (*owner.aliases, target.name)},
            )
        else:
            first[identity] = len(merged)
            merged.append(target)
    return merged


def _matches(pattern: str, targets: list[Target]) -> list[Target]:
    if pattern == "@first":
        return targets[:1]
    if pattern == "@last":
        return targets[-1:]
    found = [
        t
        for t in targets
        if any(fnmatchcase(n, pattern) or fnmatchcase(n.rpartition(".")[0], pattern) for n in (t.name, *t.aliases))
    ]
    if not found:
        paths = [t.module or t.name for t in targets]
        close = nearest(pattern, paths) or paths[:3]
        raise NoEffectError(
            f'layer pattern "{pattern}" matches no prunable layer; nearest: {", ".join(close)} '
            f"({len(targets)} prunable layers in all)"
        )
    return found
