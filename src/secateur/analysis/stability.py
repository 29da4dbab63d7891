"""How alike masks of several seeds are, and which layers they leave too little of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from secateur.core.masks import Masks
from secateur.errors import NoEffectError, UsageError

__all__ = ["LayerCollapse", "LayerOverlap", "MaskOverlap", "collapsed_layers", "mask_overlap"]


@dataclass(frozen=True)
class LayerOverlap:
    """Jaccard similarity of masks, pair by pair: 1 = the same, 0 = disjoint.

    Args:
        kept: of what is kept, one number a pair.
        removed: of what is removed, one number a pair.
    """

    kept: tuple[float, ...]
    removed: tuple[float, ...]

    @property
    def mean_kept(self) -> float:
        return sum(self.kept) / len(self.kept)

    @property
    def mean_removed(self) -> float:
        return sum(self.removed) / len(self.removed)


@dataclass(frozen=True)
class MaskOverlap:
    """How alike several masks of one network are.

    Args:
        pairs: which two of the masks each number compares.
        overall: over all layers together.
        layers: name -> in that layer.
    """

    pairs: tuple[tuple[int, int], ...]
    overall: LayerOverlap
    layers: dict[str, LayerOverlap]


@dataclass(frozen=True)
class LayerCollapse:
    """A layer that too little is left of.

    Args:
        layer: name of the masked parameter.
        kept, total: weights kept, of how many.
        reason: "empty": nothing is kept, so no signal passes; "thin": the kept share is below the threshold;
            "disconnected": no path from input to output leads through what is kept.
    """

    layer: str
    kept: int
    total: int
    reason: Literal["empty", "thin", "disconnected"]


def mask_overlap(masks: Sequence[Masks]) -> MaskOverlap:
    """Pairwise Jaccard similarity of masks, for instance of several seeds.

    Where both keep nothing (or remove nothing) they agree: 1. Numbers of pairs that share a mask depend on each other,
    so their spread gives no interval.

    Args:
        masks: at least two, of the same parameters.

    Raises: `UsageError` otherwise.

    Cost: some reads of the masks for each pair.

    Examples:
        >>> import torch
        >>> a, b = (Masks({"w": torch.tensor(m)}) for m in ([True, True, False], [True, False, False]))
        >>> mask_overlap([a, b]).overall
        LayerOverlap(kept=(0.5,), removed=(0.5,))
    """
    if len(masks) < 2:
        raise UsageError(f"mask_overlap: got {len(masks)} masks, expected at least two to compare")
    first = masks[0]
    for number, other in enumerate(masks):
        names = sorted(first.keys() ^ other.keys()) or [n for n in first if first[n].shape != other[n].shape]
        if names:
            raise UsageError(
                f'mask_overlap: masks 0 and {number} differ in "{names[0]}" (missing, or of another shape); '
                "compare masks of one network and the same targets"
            )
    pairs = tuple(combinations(range(len(masks)), 2))
    layers = {n: _overlap([Masks({n: m[n]}) for m in masks], pairs) for n in first}
    return MaskOverlap(pairs, _overlap(masks, pairs), layers)


def collapsed_layers(masks: Masks, *, below: float = 0.0) -> list[LayerCollapse]:
    """Layers of which nothing is kept, or less than a share `below`; an empty list is good news.

    An empty layer closes the network, unless there is a way around it. `disconnected_layers` finds those that keep
    weights of no use.

    Args:
        below: in [0, 1]; at 0 only empty layers count.

    Examples:
        >>> import torch
        >>> collapsed_layers(Masks({"a": torch.tensor([False, False]), "b": torch.tensor([True, False])}))
        [LayerCollapse(layer='a', kept=0, total=2, reason='empty')]
    """
    if not 0.0 <= below <= 1.0:
        raise UsageError(f"collapsed_layers: below is a share in [0, 1], got {below}")
    if not masks:
        raise NoEffectError("collapsed_layers: the masks are empty, so no layer is looked at")
    return [
        LayerCollapse(name, kept, total, "thin" if kept else "empty")
        for name, kept, total in masks.layers()
        if total and (not kept or kept / total < below)
    ]


def _overlap(masks: Sequence[Masks], pairs: Sequence[tuple[int, int]]) -> LayerOverlap:
    gone = [Masks({name: ~mask for name, mask in m.items()}) for m in masks]
    return LayerOverlap(
        tuple(masks[i].overlap(masks[j]) for i, j in pairs), tuple(gone[i].overlap(gone[j]) for i, j in pairs)
    )
