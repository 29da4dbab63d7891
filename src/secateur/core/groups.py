"""Which entries of which tensors must go together when a unit is removed.

A *group* is a set of units of equal standing, and for each unit the slices of every tensor that exist only
for it: the weights and bias that *produce* it, the per-unit state that *follows* it (norms, depthwise
convolutions), and the input slices of the layers that *consume* it. This file is pure data: how groups are
found is the business of an engine (`secateur.surgery`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.core.targets import unwrap
from secateur.errors import UnknownNameError, UsageError

__all__ = ["Group", "Groups", "Member", "Size", "clear_entries_", "unit_masks"]

Role = Literal["producer", "follower", "consumer"]


@dataclass(frozen=True, eq=False)
class Member:
    """The slices of one tensor that belong to the units of a group.

    Args:
        path: name of a parameter or buffer.
        dim: dimension along which its entries belong to units.
        role: `"producer"` makes the unit, `"follower"` is per-unit state on the way, `"consumer"` reads it.
        index: `[units, r]`; entries `index[i]` along `dim` belong to unit `i`. `r` is above 1 after a flatten
            (one entry per position) or where one unit is read at several places.
        groups: above 1 for the dimension that a grouped convolution stores per group (the input dimension of
            a convolution, the output dimension of a transposed one): entries are then numbered over all
            groups, which lie one after the other along dimension 0.
    """

    path: str
    dim: int
    role: Role
    index: NDArray[np.int64]
    groups: int = 1

    @property
    def layer(self) -> str:
        """Path of the module that owns the tensor."""
        return self.path.rpartition(".")[0]


class Size(NamedTuple):
    """An attribute of a module that shrinks by `per_unit` with every unit removed (`out_channels`, ...)."""

    module: str
    attribute: str
    per_unit: int


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can be removed one by one, each with everything that depends on it.

    Args:
        name: name of the first producer's weight, in definition order; unique among `Groups`.
        units: how many units.
        members: every slice that goes with the units.
        sizes: module attributes that shrink with the units.
        blocks: the units form this many equal, contiguous blocks in which equally many must be kept
            (grouped convolutions, GroupNorm); 1 elsewhere.
        blocked: why the group must not be cut; None if it may.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    sizes: tuple[Size, ...] = ()
    blocks: int = 1
    blocked: str | None = None

    @cached_property
    def producers(self) -> tuple[str, ...]:
        """Weight names of the layers that make the units, in definition order."""
        first: dict[str, str] = {}
        for member in self.members:
            if member.role == "producer":
                first.setdefault(member.layer, member.path)
        return tuple(first.values())

    @cached_property
    def consumers(self) -> tuple[str, ...]:
        """Weight names of the layers that read the units, in definition order."""
        first: dict[str, str] = {}
        for member in self.members:
            if member.role == "consumer":
                first.setdefault(member.layer, member.path)
        return tuple(first.values())

    @property
    def coupled(self) -> bool:
        """More than one layer makes each unit: residual sums, gates, tied weights."""
        return len(self.producers) > 1

    def check_kept(self, kept: Tensor) -> None:
        """Raise `UsageError` unless `kept` (bool, `[units]`, True = kept) is a choice this group allows."""
        what = f'group "{self.name}"'
        if kept.dtype != torch.bool or kept.shape != (self.units,):
            got = f"{kept.dtype} {list(kept.shape)}"
            raise UsageError(f"{what}: kept is {got}, expected torch.bool [{self.units}], True = kept")
        if bool(kept.all()):
            return
        if self.blocked is not None:
            raise UsageError(f"{what} must not be cut: {self.blocked}; leave it out")
        if not bool(kept.any()):
            raise UsageError(f"{what}: none of its {self.units} units is kept; keep at least one")
        counts = kept.reshape(self.blocks, -1).sum(dim=1).tolist()
        if len(set(counts)) > 1:
            raise UsageError(
                f"{what}: its {self.blocks} blocks keep {min(counts)} to {max(counts)} units, expected equally "
                "many in each (grouped convolution or GroupNorm); select with blocks"
            )


class Groups(Sequence[Group]):
    """An ordered, named collection of `Group`s (definition order of the model).

    Args:
        items: the groups.
        untraced: paths of layers with parameters that the traced forward pass never reached (auxiliary
            heads of training mode, for instance): no group knows about them.
    """

    def __init__(self, items: Sequence[Group], untraced: Sequence[str] = ()) -> None:
        self._items = tuple(items)
        self.untraced = tuple(untraced)
        self._by_name: dict[str, Group] = {group.name: group for group in self._items}
        for group in self._items:
            for member in group.members:
                if member.role == "producer":
                    self._by_name.setdefault(member.path, group)

    def __getitem__(self, key: int | str) -> Group:  # type: ignore[override]
        """A group by position, by name, or by the name of any parameter that produces its units."""
        if not isinstance(key, str):
            return self._items[key]
        if key not in self._by_name:
            raise UnknownNameError("group", key, self._by_name)
        return self._by_name[key]

    def __contains__(self, key: object) -> bool:
        return key in self._by_name if isinstance(key, str) else key in self._items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._items)

    def __repr__(self) -> str:
        return f"Groups({[group.name for group in self._items]})"

    @property
    def names(self) -> list[str]:
        return [group.name for group in self._items]

    def prunable(self) -> Groups:
        """The groups that may be cut."""
        return Groups([g for g in self._items if g.blocked is None], self.untraced)

    def inner(self) -> Groups:
        """The groups that may be cut and run from exactly one layer to exactly one other.

        These are the channels inside a branch: no residual sum makes them, and no second branch reads them (the
        stem in front of a bottleneck ResNet, which two convolutions read, is not inner).
        """
        items = [g for g in self._items if g.blocked is None and not g.coupled and len(g.consumers) == 1]
        return Groups(items, self.untraced)


def clear_entries_(mask: Tensor, dim: int, entries: Tensor, groups: int = 1) -> None:
    """Set `entries` along `dim` of a contiguous bool `mask` to False; see `Member.groups` for the numbering."""
    if groups == 1:
        mask.index_fill_(dim, entries, False)
        return
    per_group = mask.shape[dim]
    view = mask.view(groups, mask.shape[0] // groups, *mask.shape[1:])
    view[entries // per_group, :, entries % per_group] = False


def unit_masks(groups: Groups, kept: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Parameter-shaped masks of the masked self: False exactly where a cut would remove entries.

    Args:
        groups: groups of `model`.
        kept: per group (named by itself or any of its producers) a bool tensor `[units]`, True = kept.
        model: the network; only shapes and devices are read.

    Returns:
        Parameter name -> bool tensor of its shape, for every parameter that belongs to a named group:
        producers, followers and consumers. Buffers are left out.

    Raises:
        UnknownNameError: a name in `kept` is no group. UsageError: a group does not allow its `kept`.
    """
    parameters = dict(unwrap(model).named_parameters())
    masks: dict[str, Tensor] = {}
    for name, keep in kept.items():
        group = groups[name]
        group.check_kept(keep)
        removed = (~keep).cpu()
        for member in group.members:
            parameter = parameters.get(member.path)
            if parameter is None:
                continue
            if member.path not in masks:
                masks[member.path] = torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device)
            mask = masks[member.path]
            entries = torch.from_numpy(member.index)[removed].reshape(-1).to(mask.device)
            clear_entries_(mask, member.dim, entries, member.groups)
    return masks
