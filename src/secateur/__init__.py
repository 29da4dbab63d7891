"""Train networks to be pruned, prune them with dropout, noise and scores, cut them for real, prove the cut exact.

Names are loaded when first used, so `import secateur` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from secateur._version import __version__

if TYPE_CHECKING:
    from secateur.analysis.cost import Cost, compare_costs, measure_cost
    from secateur.analysis.latency import latency_ratio, measure_latency
    from secateur.core.duration import Duration, Progress
    from secateur.core.groups import Group, Groups
    from secateur.core.masks import Hold, Masks
    from secateur.core.schedule import Gradual, Iterative, OneShot
    from secateur.core.select import select
    from secateur.core.targets import Target, Targets, find_targets
    from secateur.criteria.base import Criterion, Evidence
    from secateur.criteria.bn_gamma import BnGamma
    from secateur.criteria.driver import score_targets
    from secateur.criteria.magnitude import Magnitude
    from secateur.criteria.mean_activation import MeanActivation
    from secateur.criteria.random import Random
    from secateur.criteria.saliency import Saliency
    from secateur.criteria.taylor import Taylor
    from secateur.errors import SecateurError
    from secateur.lab.oneshot import PruneReport, prune_units_, prune_weights
    from secateur.regularizers.base import Regularizer, WeightNoise
    from secateur.regularizers.ddrop import DDrop
    from secateur.regularizers.dropout import Dropout
    from secateur.regularizers.none import NoRegularizer
    from secateur.regularizers.targeted_dropout import TargetedDropout
    from secateur.sparsify.ranking import SelectionRule, rank, rank_units
    from secateur.sparsify.sparsifier import Sparsifier
    from secateur.surgery.engine import trace_groups
    from secateur.surgery.file import load_pruned, save_pruned
    from secateur.surgery.plan import Plan, align, make_plan
    from secateur.surgery.verify import cut_verified_, max_difference

_HOMES = {
    "analysis.cost": ("Cost", "compare_costs", "measure_cost"),
    "analysis.latency": ("latency_ratio", "measure_latency"),
    "core.duration": ("Duration", "Progress"),
    "core.groups": ("Group", "Groups"),
    "core.masks": ("Hold", "Masks"),
    "core.schedule": ("Gradual", "Iterative", "OneShot"),
    "core.select": ("select",),
    "core.targets": ("Target", "Targets", "find_targets"),
    "criteria.base": ("Criterion", "Evidence"),
    "criteria.bn_gamma": ("BnGamma",),
    "criteria.driver": ("score_targets",),
    "criteria.magnitude": ("Magnitude",),
    "criteria.mean_activation": ("MeanActivation",),
    "criteria.random": ("Random",),
    "criteria.saliency": ("Saliency",),
    "criteria.taylor": ("Taylor",),
    "errors": ("SecateurError",),
    "lab.oneshot": ("PruneReport", "prune_units_", "prune_weights"),
    "regularizers.base": ("Regularizer", "WeightNoise"),
    "regularizers.ddrop": ("DDrop",),
    "regularizers.dropout": ("Dropout",),
    "regularizers.none": ("NoRegularizer",),
    "regularizers.targeted_dropout": ("TargetedDropout",),
    "sparsify.ranking": ("SelectionRule", "rank", "rank_units"),
    "sparsify.sparsifier": ("Sparsifier",),
    "surgery.engine": ("trace_groups",),
    "surgery.file": ("load_pruned", "save_pruned"),
    "surgery.plan": ("Plan", "align", "make_plan"),
    "surgery.verify": ("cut_verified_", "max_difference"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BnGamma",
    "Cost",
    "Criterion",
    "DDrop",
    "Dropout",
    "Duration",
    "Evidence",
    "Gradual",
    "Group",
    "Groups",
    "Hold",
    "Iterative",
    "Magnitude",
    "Masks",
    "MeanActivation",
    "NoRegularizer",
    "OneShot",
    "Plan",
    "Progress",
    "PruneReport",
    "Random",
    "Regularizer",
    "Saliency",
    "SecateurError",
    "SelectionRule",
    "Sparsifier",
    "Target",
    "TargetedDropout",
    "Targets",
    "Taylor",
    "WeightNoise",
    "__version__",
    "align",
    "compare_costs",
    "cut_verified_",
    "find_targets",
    "latency_ratio",
    "load_pruned",
    "make_plan",
    "max_difference",
    "measure_cost",
    "measure_latency",
    "prune_units_",
    "prune_weights",
    "rank",
    "rank_units",
    "save_pruned",
    "score_targets",
    "select",
    "trace_groups",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(importlib.import_module(f"secateur.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
