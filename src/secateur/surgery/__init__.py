"""Real removal: groups of units that go together, plans as data, cuts with proof, and the pruned-model file."""

from __future__ import annotations

from secateur.surgery.cut import CutReport, cut_
from secateur.surgery.engine import Engine, TorchPruningEngine, trace_groups
from secateur.surgery.file import PrunedHeader, load_pruned, read_pruned_header, save_pruned
from secateur.surgery.plan import Cut, Edit, Plan, align, fingerprint, make_plan
from secateur.surgery.verify import cut_verified_, max_difference

__all__ = [
    "Cut",
    "CutReport",
    "Edit",
    "Engine",
    "Plan",
    "PrunedHeader",
    "TorchPruningEngine",
    "align",
    "cut_",
    "cut_verified_",
    "fingerprint",
    "load_pruned",
    "make_plan",
    "max_difference",
    "read_pruned_header",
    "save_pruned",
    "trace_groups",
]
