"""Many perturbed variants of one network, evaluated on the same data.

A variant is a few numbers: what it does to the weights is regenerated whenever it is asked for, and
never stored. Importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.variants.evaluate import evaluate_variants
    from secateur.variants.greedy import GreedyOracle, GreedyStep, greedy_oracle
    from secateur.variants.kinds import (
        DropLayer,
        DropUnit,
        DropUnits,
        LayerSparsity,
        NoisyPrune,
        UnitMasks,
        Variant,
        variant_from,
    )
    from secateur.variants.outcome import Outcome
    from secateur.variants.pareto_race import FrontArm, FrontResult
    from secateur.variants.race import Arm, RaceResult
    from secateur.variants.racing import race_front, race_variants
    from secateur.variants.unit_choice import UnitsByCriterion
    from secateur.variants.workbench import Workbench

__all__ = [
    "Arm",
    "DropLayer",
    "DropUnit",
    "DropUnits",
    "FrontArm",
    "FrontResult",
    "GreedyOracle",
    "GreedyStep",
    "LayerSparsity",
    "NoisyPrune",
    "Outcome",
    "RaceResult",
    "UnitMasks",
    "UnitsByCriterion",
    "Variant",
    "Workbench",
    "evaluate_variants",
    "greedy_oracle",
    "race_front",
    "race_variants",
    "variant_from",
]

_HOMES = {
    "Arm": "race",
    "DropLayer": "kinds",
    "DropUnit": "kinds",
    "DropUnits": "kinds",
    "FrontArm": "pareto_race",
    "FrontResult": "pareto_race",
    "GreedyOracle": "greedy",
    "GreedyStep": "greedy",
    "LayerSparsity": "kinds",
    "NoisyPrune": "kinds",
    "Outcome": "outcome",
    "RaceResult": "race",
    "UnitMasks": "kinds",
    "UnitsByCriterion": "unit_choice",
    "Variant": "kinds",
    "Workbench": "workbench",
    "evaluate_variants": "evaluate",
    "greedy_oracle": "greedy",
    "race_front": "racing",
    "race_variants": "racing",
    "variant_from": "kinds",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
