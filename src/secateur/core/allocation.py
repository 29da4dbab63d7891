"""How a network's sparsity is shared out among its tensors."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.core.targets import Target, Targets
from secateur.errors import UnknownNameError, UsageError

__all__ = ["ALLOCATIONS", "allocate", "erk"]

ALLOCATIONS = ("uniform", "erk")


def allocate(targets: Targets, sparsity: float, allocation: str | Mapping[str, float] = "uniform") -> dict[str, float]:
    """Sparsity of every target.

    Args:
        targets: what is pruned.
        sparsity: fraction of all target weights to remove, in [0, 1); ignored for a given mapping.
        allocation: `"uniform"`, `"erk"`, or a mapping from every target's name to its sparsity.
    """
    if not isinstance(allocation, str):
        missing = [t.name for t in targets if t.name not in allocation]
        if missing:
            raise UsageError(f"allocation gives no sparsity for {missing[:3]}; it must name every target")
        unknown = [name for name in allocation if name not in targets.names]
        if unknown:
            raise UnknownNameError("target in the allocation", unknown[0], targets.names)
        given = {t.name: float(allocation[t.name]) for t in targets}
        bad = {name: s for name, s in given.items() if not 0.0 <= s < 1.0}
        if bad:
            raise UsageError(f"allocation: sparsity lies in [0, 1), got {bad}")
        return given
    if allocation == "uniform":
        return {t.name: sparsity for t in targets}
    if allocation == "erk":
        return erk(targets, sparsity)
    raise UnknownNameError("allocation", allocation, ALLOCATIONS)


def erk(targets: Targets, sparsity: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel allocation: density proportional to (sum of dimensions) / (product of dimensions).

    A density that would exceed 1 is set to 1 and the rest is solved again, so that the total number of
    kept weights is `(1 - sparsity)` of all.

    Reference: Evci et al., "Rigging the Lottery", ICML 2020, section 3.
    """
    if not 0.0 <= sparsity < 1.0:
        raise UsageError(f"sparsity is the fraction removed and lies in [0, 1), got {sparsity}")
    ratio = {t.name: _dimension_sum(t) / t.numel for t in targets}
    full: set[str] = set()
    while True:
        budget = (1.0 - sparsity) * sum(t.numel for t in targets) - sum(t.numel for t in targets if t.name in full)
        open_ = [t for t in targets if t.name not in full]
        if not open_:
            return {t.name: 0.0 for t in targets}
        scale = budget / sum(ratio[t.name] * t.numel for t in open_)
        over = {t.name for t in open_ if scale * ratio[t.name] > 1.0}
        if not over:
            return {t.name: 0.0 if t.name in full else 1.0 - scale * ratio[t.name] for t in targets}
        full |= over


def _dimension_sum(target: Target) -> int:
    return sum(target.shape)
