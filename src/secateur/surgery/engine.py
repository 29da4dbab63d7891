"""From a network to its groups: which units can be removed, and everything that goes with each."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from secateur.core.groups import Group, Groups, Member, Size
from secateur.core.targets import unwrap
from secateur.errors import NoEffectError, TraceError, UsageError, nearest
from secateur.surgery.isolate import OutOfTime, WorkFailed, can_fork, run_in_fork, run_in_thread
from secateur.surgery.layers import Slices, slices_of

__all__ = ["Engine", "TorchPruningEngine", "trace_groups"]


class Engine(Protocol):
    """Anything that finds the groups of a network."""

    def trace(self, model: nn.Module, inputs: tuple[Any, ...], roots: Sequence[str] | None) -> str:
        """Coupled entries of `model` as JSON (see `secateur.surgery.graph.trace`).

        `model` and `inputs` are the engine's own: it may change them. It may also hang or crash.
        """
        ...

    def prepare(self) -> None:
        """Import what `trace` needs, in the process that will be forked."""
        ...


class TorchPruningEngine:
    """Groups from autograd's graph, as Torch-Pruning's `DependencyGraph` reads it."""

    def prepare(self) -> None:
        import torch_pruning  # noqa: F401

        import secateur.surgery.graph  # noqa: F401

    def trace(self, model: nn.Module, inputs: tuple[Any, ...], roots: Sequence[str] | None) -> str:
        from secateur.surgery.graph import trace

        return trace(model, inputs, roots)


def trace_groups(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    timeout: float = 60.0,
    roots: Sequence[str] | None = None,
    engine: Engine | None = None,
) -> Groups:
    """Find which units of `model` can be removed, and every slice that goes with each.

    Runs one forward pass in eval mode on a copy, in a child process that is killed after `timeout`; the
    network comes back exactly as it was. Frozen networks are traced like any other.

    Args:
        model: the network, on any device; wrappers of `torch.compile` and data parallelism are looked through.
        example_inputs: what `forward` takes: one tensor, or a tuple of positional arguments.
        timeout: seconds after which tracing is given up.
        roots: shell patterns of linear or convolution layer paths (`"blocks.*.mlp.fc1"`): find only the groups
            that hold the units of these layers. Helps where the whole network cannot be traced.
        engine: what traces; Torch-Pruning's graph by default.

    Returns:
        Groups in definition order, those that must not be cut included (`Group.blocked` says why).

    Raises:
        TraceError: tracing failed, crashed or took too long. NoEffectError: a root matches no layer, or the
        network has no unit to find. UsageError: `timeout` is not positive.

    Cost: one forward pass on the CPU with one thread, plus a few copies of the index sets; no extra weights for
    networks that live on the CPU.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> groups = trace_groups(net, torch.zeros(1, 4))
        >>> groups["0.weight"].units, groups["2.weight"].blocked
        (8, 'its units are the output of the network')
    """
    model = unwrap(model)
    if not timeout > 0:
        raise UsageError(f"timeout={timeout!r}: expected a positive number of seconds")
    if roots is not None:
        _check_roots(model, roots)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    engine = engine or TorchPruningEngine()
    engine.prepare()
    raw = json.loads(_isolated(engine, model, inputs, roots, timeout))
    groups = _name_groups(model, raw["groups"])
    if not groups:
        raise NoEffectError(
            f"{type(model).__name__}: tracing found no unit to remove; expected linear or convolution layers "
            "with more than one output on the path from input to output"
        )
    return Groups(groups, raw["untraced"])


def _check_roots(model: nn.Module, roots: Sequence[str]) -> None:
    paths = [p for p, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    for pattern in roots:
        if not any(fnmatchcase(path, pattern) for path in paths):
            close = nearest(pattern, paths) or paths[:3]
            raise NoEffectError(
                f'root pattern "{pattern}" matches no linear or convolution layer; nearest: {", ".join(close)}'
            )


def _isolated(
    engine: Engine, model: nn.Module, inputs: tuple[Any, ...], roots: Sequence[str] | None, timeout: float
) -> str:
    name = type(model).__name__
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    fork = can_fork()
    if device.type not in ("cpu", "meta") or not fork:
        model = _cpu_copy(model)
        device = torch.device("cpu") if device.type != "meta" else device
    inputs = tuple(x.detach().to(device) if isinstance(x, Tensor) else x for x in inputs)

    def work() -> str:
        model.eval()
        return engine.trace(model, inputs, roots)

    try:
        return (run_in_fork if fork else run_in_thread)(work, timeout)
    except OutOfTime:
        raise TraceError(
            f"tracing {name} took longer than {timeout:g} s; give roots=[...] (hidden layers of its MLPs, for "
            "instance) to trace only these, or raise timeout"
        ) from None
    except WorkFailed as failure:
        raise TraceError(
            f"tracing {name} failed: {failure}; check that example_inputs fit its forward, or give roots=[...] "
            "to trace only some layers"
        ) from None


def _cpu_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU; tensors are copied there once, not first on their own device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        values = parameter.detach().to("cpu", copy=True) if not parameter.is_meta else parameter.detach()
        memo[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True) if not buffer.is_meta else buffer.detach()
    return copy.deepcopy(model, memo)


def _name_groups(model: nn.Module, raw: list[dict[str, Any]]) -> list[Group]:
    names = _all_names(model)
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    built = [group for item in raw if (group := _group(model, names, item)) is not None]
    built.sort(key=lambda group: (order[group.name.rpartition(".")[0]], -group.units))
    seen: dict[str, int] = {}
    groups = []
    for group in built:
        count = seen[group.name] = seen.get(group.name, -1) + 1
        name = f"{group.name}[{count}]" if count else group.name
        groups.append(Group(name, group.units, group.members, group.sizes, group.blocks, group.blocked))
    return groups


def _all_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every name of a parameter or buffer, with all names of the same tensor, in definition order."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    same: dict[int, list[str]] = {}
    for name, tensor in named:
        same.setdefault(id(tensor), []).append(name)
    return {name: tuple(same[id(tensor)]) for name, tensor in named}


def _group(model: nn.Module, names: dict[str, tuple[str, ...]], raw: dict[str, Any]) -> Group | None:
    members: list[Member] = []
    sizes: list[Size] = []
    makers: list[str] = []
    reasons: list[str] = [_reason(why, where) for why, where in raw["flags"]]
    blocks: list[tuple[int, int, np.ndarray[Any, Any], str]] = []
    for kind, name, side, entries in raw["entries"]:
        index = np.array(entries, dtype=np.int64)
        if kind == "parameter":
            owner = model.get_submodule(name.rpartition(".")[0])
            if not isinstance(owner, nn.RMSNorm):
                tensor = model.get_parameter(name)
                if sum(length > 1 for length in tensor.shape) > 1:
                    reasons.append(f'they add up with the bare parameter "{name}" {list(tensor.shape)}')
                members.extend(Member(alias, side, "follower", index) for alias in names[name])
                continue
            name, side = name.rpartition(".")[0], "both"
        found = slices_of(model.get_submodule(name), side)
        if isinstance(found, str):
            reasons.append(f'layer "{name}": {found}')
            makers.extend([f"{name}.weight" if name else "weight"] if side == "out" else [])
            continue
        members.extend(_members(names, name, found, index))
        sizes.extend(Size(name, attribute, index.shape[1]) for attribute in found.sizes)
        if found.blocks > 1:
            blocks.append((found.blocks, found.size, index, name))
    first = next((m.path for m in members if m.role == "producer"), next(iter(makers), None))
    if first is None:
        return None
    count = math.lcm(*(b for b, _, _, _ in blocks)) if blocks else 1
    reasons.extend(_misaligned(raw["units"], count, blocks))
    unique = tuple(dict.fromkeys(reasons))
    blocked = "; ".join(unique[:3]) or None
    return Group(first, raw["units"], tuple(members), tuple(sizes), 1 if blocked else count, blocked)


def _members(names: dict[str, tuple[str, ...]], layer: str, found: Slices, index: np.ndarray[Any, Any]) -> list[Member]:
    members = []
    for attribute, dim, groups in found.tensors:
        path = f"{layer}.{attribute}" if layer else attribute
        for alias in names.get(path, (path,)):
            members.append(Member(alias, dim, found.role, index, groups))
    return members


def _misaligned(units: int, count: int, blocks: list[tuple[int, int, np.ndarray[Any, Any], str]]) -> list[str]:
    """Layers whose blocks do not run along with the units, so that equal counts cannot be promised."""
    if count > 1 and (units % count or units == count):
        per = "one channel" if units == count else f"{units}/{count} units"
        return [f'layer "{blocks[0][3]}" works in {count} blocks of {per}']
    reasons = []
    for blocks_here, size, index, name in blocks:
        expected = np.arange(units) // (units // blocks_here)
        if index.size != size or not np.array_equal(index // (size // blocks_here), expected[:, None] + 0 * index):
            reasons.append(f'layer "{name}" works in {blocks_here} blocks that the units do not fill in order')
    return reasons


def _reason(why: str, where: str) -> str:
    if why == "output":
        return "its units are the output of the network"
    if why == "input":
        return "its units add up or concatenate with the input of the network"
    if why == "mixing":
        return f"its units go through {where}"
    if why == "lost":
        return "they go through a reshape that the tracer cannot follow"
    return f'layer "{where}" has another number of entries than the layers before it'
