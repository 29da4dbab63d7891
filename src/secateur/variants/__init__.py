"""Many perturbed variants of one network, evaluated on the same data.

A variant is a few numbers: what it does to the weights is regenerated whenever it is asked for, on any machine, and
never stored. Importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.variants.evaluate import evaluate_variants
    from secateur.variants.kinds import (
        DropLayer,
        DropUnit,
        LayerSparsity,
        NoisyPrune,
        UnitMasks,
        Variant,
        variant_from,
    )
    from secateur.variants.outcome import Outcome
    from secateur.variants.workbench import Workbench

__all__ = [
    "DropLayer",
    "DropUnit",
    "LayerSparsity",
    "NoisyPrune",
    "Outcome",
    "UnitMasks",
    "Variant",
    "Workbench",
    "evaluate_variants",
    "variant_from",
]

_HOMES = {
    "DropLayer": "kinds",
    "DropUnit": "kinds",
    "LayerSparsity": "kinds",
    "NoisyPrune": "kinds",
    "Outcome": "outcome",
    "UnitMasks": "kinds",
    "Variant": "kinds",
    "Workbench": "workbench",
    "evaluate_variants": "evaluate",
    "variant_from": "kinds",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
