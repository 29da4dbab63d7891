"""Real removal: groups of units that go together, plans as data, cuts with proof, and the pruned-model file."""

from __future__ import annotations

from secateur.surgery.cut import CutReport, cut_
from secateur.surgery.engine import Engine, TorchPruningEngine, trace_groups
from secateur.surgery.plan import Cut, Edit, Plan, align, fingerprint, make_plan
from secateur.surgery.verify import cut_verified_, max_difference

__all__ = [
    "Cut",
    "CutReport",
    "Edit",
    "Engine",
    "Plan",
    "TorchPruningEngine",
    "align",
    "cut_",
    "cut_verified_",
    "fingerprint",
    "make_plan",
    "max_difference",
    "trace_groups",
]
