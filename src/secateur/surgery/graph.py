"""Torch-Pruning's traced graph, read as sets of entries that go together.

Torch-Pruning follows autograd's `grad_fn`s and says, for every pair of neighbors, which entry of one
dimension is which entry of the next. Here these relations are closed under "goes together" once for the whole
network: entries are the nodes of a graph, relations its edges, and a unit is a connected component. That
finds couplings inside one layer too (gated halves, shuffles), and ends where a search per layer may not.
"""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn

from secateur.surgery.layers import is_depthwise, slices_of
from secateur.surgery.values import tensors_in

__all__ = ["trace"]

Key = tuple[int, str]
Ints = NDArray[np.int64]

# Stands for entries beyond the largest layer: a reshape that the tracer read wrongly, perhaps again and again.
_LOST: Key = (-1, "lost")

# Operations that mix entries of the dimension they are given, so that removing one changes the others.
_MIXING = {
    "Bmm": "a product of two activations (attention)",
    "ScaledDotProduct": "attention",
    "Softmax": "a softmax",
    "PixelShuffle": "a pixel shuffle",
    "ChannelShuffle": "a channel shuffle",
    "Cumsum": "a cumulative sum",
}


class _Port(nn.Module):
    """Marks where an input enters, so that sums and concatenations with the input are seen."""

    def __init__(self, channels: int | None) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class _Ported(nn.Module):
    def __init__(self, net: nn.Module, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.net = net
        self.ports = nn.ModuleList(_Port(_channels(x)) for x in inputs)

    def forward(self, *inputs: Any) -> Any:
        entered = [
            port(x.detach().requires_grad_()) if isinstance(x, Tensor) and x.is_floating_point() else x
            for port, x in zip(self.ports, inputs, strict=True)
        ]
        return self.net(*entered)


def _channels(x: Any) -> int | None:
    """Channels of an input; unknown for `[batch, a, b]`, which may be (channels, length) or (tokens, channels)."""
    return int(x.shape[1]) if isinstance(x, Tensor) and x.ndim >= 2 and x.ndim != 3 else None


def trace(model: nn.Module, inputs: tuple[Any, ...], roots: Sequence[str] | None) -> str:
    """Trace `model` and return its coupled entries as JSON; leaves traces in `model`, so give it a copy.

    The answer: `{"groups": [{"units": n, "entries": [["layer", path, side, index] or ["parameter", name, dim,
    index], ...], "flags": [[why, where], ...]}, ...], "untraced": [module path, ...]}`.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph, outputs = _build(model, inputs)
    return json.dumps(_Closure(graph, model, outputs).run(roots))


def _build(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, set[Any]]:
    import torch_pruning as tp

    class PortPruner(tp.pruner.function.BasePruningFunc):
        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: nn.Module) -> int | None:
            assert isinstance(layer, _Port)
            return layer.channels

        get_in_channels = get_out_channels

    outputs: set[Any] = set()

    def remember(output: Any) -> list[Tensor]:
        found = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
        if not found:
            raise RuntimeError("no output depends on the parameters (forward under no_grad, or detached?)")
        outputs.update(tensor.grad_fn for tensor in found)
        return found

    graph = tp.DependencyGraph()
    graph.build_dependency(
        _Ported(model, inputs),
        inputs,
        forward_fn=lambda net, args: net(*args),
        output_transform=remember,
        customized_pruners={_Port: PortPruner()},
        verbose=False,
    )
    return graph, outputs


class _Closure:
    """Entries of every (node, side) reached from the roots, and the relations between them."""

    def __init__(self, graph: Any, model: nn.Module, outputs: set[Any]) -> None:
        self.nodes = list(graph.module2node.values())
        self.number = {id(node): i for i, node in enumerate(self.nodes)}
        self.paths = {id(m): path for path, m in model.named_modules()}
        self.order = {path: i for i, path in enumerate(self.paths.values())}
        self.parameters = {id(p): name for name, p in model.named_parameters()}
        self.outputs = outputs
        self.model = model
        self.ids: dict[Key, Ints] = defaultdict(lambda: np.full(0, -1, dtype=np.int64))
        self.count = 0
        self.edges: list[tuple[Ints, Ints]] = []
        self.size = {
            (i, side): self._size(node, side)
            for i, node in enumerate(self.nodes)
            for side in ("prune_out_channels", "prune_in_channels")
        }
        self.limit = max((size for size in self.size.values() if size is not None), default=1)
        self.lost: list[Ints] = []
        self.tied = self._tied()

    def run(self, roots: Sequence[str] | None) -> dict[str, Any]:
        queue: list[tuple[Key, Ints]] = []
        for i, node in enumerate(self.nodes):
            path = self.paths.get(id(node.module))
            if path is None or not isinstance(node.module, nn.Linear | nn.modules.conv._ConvNd):
                continue
            if roots is None or any(fnmatchcase(path, pattern) for pattern in roots):
                module = node.module
                units = module.out_features if isinstance(module, nn.Linear) else module.out_channels
                queue.extend(self._reach((i, "prune_out_channels"), np.arange(units)))
        while queue:
            key, entries = queue.pop()
            queue.extend(self._spread(key, entries))
        traced = {id(node.module) for node in self.nodes}
        untraced = [
            path
            for path, module in self.model.named_modules()
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and id(module) not in traced
        ]
        return {"groups": self._groups(), "untraced": [p for p in untraced if not self._inside_known(p)]}

    def _inside_known(self, path: str) -> bool:
        parent = path.rpartition(".")[0]
        return isinstance(self.model.get_submodule(parent), nn.MultiheadAttention)

    def _size(self, node: Any, side: str) -> int | None:
        kind = self._kind(node)
        if kind == "parameter":
            return int(node.module.shape[node.pruning_dim])
        if kind != "layer":
            return None
        found = slices_of(node.module, self._side(node, side))
        return None if isinstance(found, str) else found.size

    def _kind(self, node: Any) -> str:
        if isinstance(node.module, nn.Parameter):
            return "parameter"
        if isinstance(node.module, _Port):
            return "input"
        return "layer" if id(node.module) in self.paths else "operation"

    def _side(self, node: Any, side: str) -> Any:
        conv = isinstance(node.module, nn.modules.conv._ConvNd)
        # Torch-Pruning calls any convolution with as many groups as outputs depthwise.
        through = conv and (is_depthwise(node.module) or node.module.groups == node.module.out_channels > 1)
        if through or not (conv or isinstance(node.module, nn.Linear)):
            return "both"
        return "out" if side == "prune_out_channels" else "in"

    def _tied(self) -> dict[Key, list[Key]]:
        """Sides of different layers that slice the same dimension of one shared tensor."""
        shared: dict[tuple[int, int], list[Key]] = defaultdict(list)
        for (i, side), size in self.size.items():
            node = self.nodes[i]
            if size is None or self._kind(node) != "layer":
                continue
            found = slices_of(node.module, self._side(node, side))
            assert not isinstance(found, str)
            for attribute, dim, _ in found.tensors:
                tensor = getattr(node.module, attribute)
                name = "prune_out_channels" if self._side(node, side) == "both" else side
                if tensor is not None and (i, name) not in shared[id(tensor), dim]:
                    shared[id(tensor), dim].append((i, name))
        return {
            key: [other for other in keys if other != key] for keys in shared.values() if len(keys) > 1 for key in keys
        }

    def _reach(self, key: Key, entries: Ints) -> list[tuple[Key, Ints]]:
        """Number the entries of `key` not met before; they are to be spread further."""
        if len(entries) == 0:
            return []
        known = self.ids[key]
        if len(known) <= entries.max():
            known = np.concatenate([known, np.full(int(entries.max()) + 1 - len(known), -1, dtype=np.int64)])
            self.ids[key] = known
        new = np.unique(entries[known[entries] < 0])
        known[new] = self.count + np.arange(len(new))
        self.count += len(new)
        return [(key, new)] if len(new) else []

    def _spread(self, key: Key, entries: Ints) -> Iterator[tuple[Key, Ints]]:
        # A layer of one entry is broadcast over all of its neighbor's, and cannot be cut anyway.
        if self.size.get(key) == 1:
            return
        for other in self.tied.get(key, ()):
            yield from self._connect(key, entries, other, entries)
        for dependency in self.nodes[key[0]].dependencies:
            if dependency.trigger.__name__ != key[1]:
                continue
            other = (self.number[id(dependency.target)], dependency.handler.__name__)
            if self.size.get(other) != 1:
                yield from self._connect(key, *_mapped(dependency.index_mapping, entries, other))

    def _connect(self, key: Key, source: Ints, other: Key, target: Ints) -> list[tuple[Key, Ints]]:
        self.lost.append(self.ids[key][source[target >= self.limit]])
        inside = (target >= 0) & (target < self.limit)
        source, target = source[inside], target[inside]
        if len(target) == 0:
            return []
        fresh = self._reach(other, target)
        self.edges.append((self.ids[key][source], self.ids[other][target]))
        return fresh

    def _groups(self) -> list[dict[str, Any]]:
        if self.count == 0:
            return []
        rows = np.concatenate([a for a, _ in self.edges]) if self.edges else np.zeros(0, dtype=np.int64)
        columns = np.concatenate([b for _, b in self.edges]) if self.edges else np.zeros(0, dtype=np.int64)
        matrix = coo_matrix((np.ones(len(rows), dtype=bool), (rows, columns)), shape=(self.count, self.count))
        unit_of = connected_components(matrix, directed=False)[1]
        units: dict[int, dict[Key, list[int]]] = defaultdict(dict)
        for key in sorted(self.ids, key=self._place):
            if not self._tells(key):
                continue
            for entry in np.flatnonzero(self.ids[key] >= 0).tolist():
                units[int(unit_of[self.ids[key][entry]])].setdefault(key, []).append(entry)
        for element in np.concatenate(self.lost).tolist() if self.lost else []:
            units[int(unit_of[element])][_LOST] = [0]
        alike: dict[tuple[tuple[Key, int], ...], list[dict[Key, list[int]]]] = defaultdict(list)
        for unit in units.values():
            alike[tuple((key, len(entries)) for key, entries in unit.items())].append(unit)
        return [self._raw(tuple(key for key, _ in signature), members) for signature, members in alike.items()]

    def _place(self, key: Key) -> tuple[int, int, bool]:
        path = self.paths.get(id(self.nodes[key[0]].module))
        return (len(self.order) if path is None else self.order[path], key[0], key[1] != "prune_out_channels")

    def _tells(self, key: Key) -> bool:
        return self._kind(self.nodes[key[0]]) != "operation" or bool(self._flags(key))

    def _raw(self, keys: tuple[Key, ...], units: list[dict[Key, list[int]]]) -> dict[str, Any]:
        """One group as plain data: its entries in layers and bare parameters, and what speaks against a cut."""
        entries: list[list[Any]] = []
        flags: list[list[str]] = []
        for key in keys:
            if key == _LOST:
                flags.append(["lost", ""])
                continue
            node, kind = self.nodes[key[0]], self._kind(self.nodes[key[0]])
            flags.extend(self._flags(key))
            size, index = self.size[key], [unit[key] for unit in units]
            if size is not None and any(max(row) >= size for row in index):
                flags.append(["range", self._name(node)])
            elif kind == "layer":
                entries.append([kind, self._name(node), self._side(node, key[1]), index])
            elif kind == "parameter":
                entries.append([kind, self._name(node), node.pruning_dim, index])
        return {"units": len(units), "entries": entries, "flags": flags}

    def _name(self, node: Any) -> str:
        return self.paths.get(id(node.module)) or self.parameters.get(id(node.module), "")

    def _flags(self, key: Key) -> list[list[str]]:
        node, kind = self.nodes[key[0]], self._kind(self.nodes[key[0]])
        flags: list[list[str]] = []
        if node.grad_fn in self.outputs and (kind != "layer" or self._side(node, key[1]) != "in"):
            flags.append(["output", self._name(node)])
        if kind == "input":
            flags.append(["input", ""])
        if kind == "operation":
            operation = type(node.grad_fn).__name__
            flags.extend(["mixing", what] for part, what in _MIXING.items() if part in operation)
        return flags


def _mapped(mappings: Sequence[Any], entries: Ints, other: Key) -> tuple[Ints, Key, Ints]:
    """`entries` and what each becomes at `other`; one entry may become several, or none."""
    active = [mapping for mapping in mappings if mapping is not None]
    if not active:
        return entries, other, entries
    from torch_pruning._helpers import _HybridIndex

    pairs = [_HybridIndex(idx=i, root_idx=i) for i in entries.tolist()]
    for mapping in active:
        pairs = mapping(pairs)
    known = [pair for pair in pairs if pair.root_idx is not None]
    source = np.array([pair.root_idx for pair in known], dtype=np.int64)
    return source, other, np.array([pair.idx for pair in known], dtype=np.int64)
