"""A cut as plain data: which entries of which tensors stay, and which attributes change."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.core.groups import Groups, clear_entries_
from secateur.core.targets import unwrap
from secateur.errors import CheckpointError, NoEffectError, UsageError

__all__ = ["SCHEMA", "Cut", "Edit", "Plan", "align", "fingerprint", "make_plan"]

SCHEMA = 1


class Cut(NamedTuple):
    """Keep the entries `kept` (ascending) of dimension `dim` of the tensor named `path`.

    `groups` above 1: entries are numbered over all groups of a grouped convolution, see
    `secateur.core.groups.Member`; every group keeps equally many.
    """

    path: str
    dim: int
    kept: tuple[int, ...]
    groups: int = 1


class Edit(NamedTuple):
    """Set `attribute` of the module at `path` to `value` (a tuple where the module holds one)."""

    path: str
    attribute: str
    value: int | tuple[int, ...]


class Units(NamedTuple):
    """What became of one group: for reports."""

    group: str
    before: int
    after: int


@dataclass(frozen=True)
class Plan:
    """Everything a cut does, as data that survives JSON; the same plan cuts a module, its optimizer and its EMA.

    Args:
        cuts: tensors to slice, each dimension on its own entry.
        edits: module attributes to set.
        units: group name, units before, units after.
        fingerprint: of the network the plan is for; no other is cut.
        schema: version of this format.
    """

    cuts: tuple[Cut, ...]
    edits: tuple[Edit, ...]
    units: tuple[Units, ...]
    fingerprint: str
    schema: int = SCHEMA

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        return {
            "schema": self.schema,
            "fingerprint": self.fingerprint,
            "units": [list(units) for units in self.units],
            "cuts": [[cut.path, cut.dim, list(cut.kept), cut.groups] for cut in self.cuts],
            "edits": [
                [e.path, e.attribute, list(e.value) if isinstance(e.value, tuple) else e.value] for e in self.edits
            ],
        }

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read `to_json`'s text back. Raises `CheckpointError` where it is not a plan."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise CheckpointError(f"plan: not JSON ({error}); expected what Plan.to_json wrote") from None
        return Plan.from_dict(data)

    @staticmethod
    def from_dict(data: Any) -> Plan:
        """Read `to_dict`'s value back. Raises `CheckpointError` where it is not a plan."""
        if not isinstance(data, dict) or "schema" not in data:
            raise CheckpointError("plan: expected a JSON object with schema, cuts, edits, units and fingerprint")
        if data["schema"] != SCHEMA:
            raise CheckpointError(
                f"plan: schema {data['schema']!r}, expected {SCHEMA}; it was written by another version of secateur"
            )
        try:
            cuts = tuple(Cut(_text(p), _count(d), _ascending(k), _count(g, 1)) for p, d, k, g in data["cuts"])
            edits = tuple(Edit(_text(p), _attribute(a), _value(v)) for p, a, v in data["edits"])
            units = tuple(Units(_text(g), _count(b), _count(a)) for g, b, a in data["units"])
            return Plan(cuts, edits, units, _text(data["fingerprint"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"plan: malformed ({type(error).__name__}: {error}); make it again") from None

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameter-shaped masks (True = kept) of the masked self; equal to `unit_masks` of the same choice.

        Raises `UsageError` when `model` is not the network the plan is for.
        """
        model = unwrap(model)
        check_fingerprint(model, self)
        parameters = dict(model.named_parameters())
        masks: dict[str, Tensor] = {}
        for cut in self.cuts:
            parameter = parameters.get(cut.path)
            if parameter is None:
                continue
            if cut.path not in masks:
                masks[cut.path] = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
            removed = torch.ones(parameter.shape[cut.dim] * cut.groups, dtype=torch.bool)
            removed[list(cut.kept)] = False
            entries = torch.nonzero(removed).reshape(-1).to(parameter.device)
            clear_entries_(masks[cut.path], cut.dim, entries, cut.groups)
        return masks


# Attributes a plan may set: a plan from a file must not be able to change anything else.
_ATTRIBUTES = frozenset(
    [
        *("in_features", "out_features", "in_channels", "out_channels", "groups"),
        *("num_features", "num_channels", "num_parameters", "normalized_shape", "embedding_dim"),
    ]
)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value


def _count(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"expected a whole number of at least {least}, got {value!r}")
    return value


def _ascending(value: Any) -> tuple[int, ...]:
    kept = tuple(_count(k) for k in value)
    if not kept or any(a >= b for a, b in itertools.pairwise(kept)):
        raise ValueError("kept entries must be ascending and not empty")
    return kept


def _attribute(value: Any) -> str:
    if value not in _ATTRIBUTES:
        raise ValueError(f"attribute {value!r} is not one a cut changes")
    return str(value)


def _value(value: Any) -> int | tuple[int, ...]:
    return tuple(_count(v, 1) for v in value) if isinstance(value, list) else _count(value, 1)


def fingerprint(model: nn.Module) -> str:
    """A hash of the names and shapes of all parameters and buffers, tied names included."""
    model = unwrap(model)
    digest = hashlib.sha256()
    for kind, named in (
        ("parameter", model.named_parameters(remove_duplicate=False)),
        ("buffer", model.named_buffers(remove_duplicate=False)),
    ):
        for name, tensor in named:
            digest.update(f"{kind} {name} {tuple(tensor.shape)}\n".encode())
    return digest.hexdigest()[:32]


def check_fingerprint(model: nn.Module, plan: Plan) -> None:
    """Raise `UsageError` unless `plan` was made for a network with these names and shapes."""
    got = fingerprint(model)
    if got != plan.fingerprint:
        raise UsageError(
            f"the plan is for network {plan.fingerprint[:8]}, got {type(unwrap(model)).__name__} {got[:8]}: another "
            "network, or this one has already been cut; make a plan for it"
        )


def make_plan(model: nn.Module, groups: Groups, kept: Mapping[str, Tensor]) -> Plan:
    """The plan that keeps `kept`.

    Args:
        model: the network the groups were traced from.
        groups: its groups.
        kept: per group (named by itself or any of its producers) a bool tensor `[units]`, True = kept; groups
            not named stay whole.

    Raises:
        UnknownNameError: a name is no group. UsageError: a group is blocked, would lose all its units, or its
        blocks keep unequal counts. NoEffectError: nothing would be removed.
    """
    model = unwrap(model)
    stays: dict[tuple[str, int, int], Tensor] = {}
    shrinks: dict[tuple[str, str], int] = {}
    units: dict[str, Units] = {}
    for name, keep in kept.items():
        group = groups[name]
        group.check_kept(keep)
        if group.name in units:
            raise UsageError(f'group "{group.name}" is given twice, as "{name}" too; give it once')
        gone = (~keep).cpu()
        units[group.name] = Units(group.name, group.units, int(keep.sum()))
        if not bool(gone.any()):
            continue
        for member in group.members:
            key = (member.path, member.dim, member.groups)
            if key not in stays:
                stays[key] = torch.ones(_length(model, *key), dtype=torch.bool)
            stays[key][torch.from_numpy(member.index)[gone].reshape(-1)] = False
        for module, attribute, per_unit in group.sizes:
            shrinks[module, attribute] = shrinks.get((module, attribute), 0) + per_unit * int(gone.sum())
    if not shrinks:
        raise NoEffectError(
            f"the plan for {type(model).__name__} removes nothing: every unit of {len(kept)} group(s) is kept; "
            "raise the sparsity"
        )
    cuts = tuple(
        Cut(path, dim, tuple(torch.nonzero(keep).reshape(-1).tolist()), g) for (path, dim, g), keep in stays.items()
    )
    edits = tuple(Edit(path, name, _shrunk(model, path, name, by)) for (path, name), by in shrinks.items())
    return Plan(cuts, edits, tuple(units[g.name] for g in groups if g.name in units), fingerprint(model))


def _length(model: nn.Module, path: str, dim: int, groups: int) -> int:
    owner, _, attribute = path.rpartition(".")
    module = model.get_submodule(owner)
    tensor = getattr(module, attribute)
    if tensor is None:  # a norm without scale: see secateur.surgery.layers
        shape = getattr(module, "normalized_shape", None)
        return int(shape[-1]) if shape is not None else int(module.num_channels)  # type: ignore[arg-type]
    return int(tensor.shape[dim]) * groups


def _shrunk(model: nn.Module, path: str, attribute: str, by: int) -> int | tuple[int, ...]:
    value: Any = getattr(model.get_submodule(path), attribute)
    return (value[0] - by,) if isinstance(value, tuple) else int(value) - by


def align(kept: Tensor, scores: Tensor, multiple: int = 16, *, blocks: int = 1) -> Tensor:
    """Keep the best-scored further units until the count is a multiple: odd widths run slowly.

    Args:
        kept: bool `[units]`, True = kept.
        scores: `[units]`, higher = keep; ties go to the lower index.
        multiple: the count rises to the next multiple of this, but never above `units`. Unchanged where the
            count is one already, or where there are fewer units than `multiple`.
        blocks: as in `Group`: every block keeps equally many.

    Examples:
        >>> align(torch.tensor([True, False, False, True, False]), torch.tensor([5.0, 1, 3, 4, 2]), 3).tolist()
        [True, False, True, True, False]
    """
    if kept.dtype != torch.bool or kept.ndim != 1 or scores.shape != kept.shape:
        raise UsageError(
            f"align: kept is {kept.dtype} {list(kept.shape)} and scores {list(scores.shape)}, expected a bool "
            "vector and as many scores"
        )
    if multiple < 1 or blocks < 1 or kept.numel() % blocks:
        raise UsageError(f"align: multiple={multiple}, blocks={blocks} for {kept.numel()} units, expected at least 1")
    if kept.numel() < multiple:
        return kept.clone()
    step = multiple // math.gcd(multiple, blocks)
    rows = kept.clone().reshape(blocks, -1)
    for row, score in zip(rows, scores.reshape(blocks, -1), strict=True):
        count = int(row.sum())
        extra = min(-(-count // step) * step, row.numel()) - count
        order = torch.sort(score, descending=True, stable=True).indices
        row[order[~row[order]][:extra]] = True
    return rows.reshape(-1)
