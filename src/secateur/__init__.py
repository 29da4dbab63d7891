"""Train networks to be pruned, prune them with dropout, noise and scores, cut them for real, prove the cut exact.

Names are loaded when first used, so `import secateur` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from secateur._version import __version__

if TYPE_CHECKING:
    from secateur.analysis.connectivity import disconnected_layers
    from secateur.analysis.cost import Cost, compare_costs, measure_cost
    from secateur.analysis.feature_variance import FeatureVariance, VarianceRatio, feature_variance, variance_ratio
    from secateur.analysis.gradient_flow import GradientFlow, gradient_flow
    from secateur.analysis.hessian import HessianForm, hessian_form
    from secateur.analysis.latency import latency_ratio, measure_latency
    from secateur.analysis.mc_dropout import MCPrediction, mc_predict
    from secateur.analysis.spread import Spread, spread
    from secateur.analysis.stability import LayerCollapse, LayerOverlap, MaskOverlap, collapsed_layers, mask_overlap
    from secateur.analysis.weight_cdf import WeightCDF, weight_cdf
    from secateur.analysis.weight_dependence import WeightDependence, weight_dependence
    from secateur.core.duration import Duration, Progress
    from secateur.core.groups import Group, Groups
    from secateur.core.masks import Hold, Masks
    from secateur.core.schedule import Gradual, Iterative, OneShot
    from secateur.core.select import select
    from secateur.core.targets import Target, Targets, find_targets
    from secateur.criteria.apoz import APoZ
    from secateur.criteria.base import Criterion, Evidence
    from secateur.criteria.bn_gamma import BnGamma
    from secateur.criteria.driver import score_targets
    from secateur.criteria.grasp import Grasp
    from secateur.criteria.lamp import Lamp
    from secateur.criteria.learned import Learned
    from secateur.criteria.magnitude import Magnitude
    from secateur.criteria.mean_activation import MeanActivation
    from secateur.criteria.oracle import Oracle
    from secateur.criteria.random import Random
    from secateur.criteria.saliency import Saliency
    from secateur.criteria.snip import Snip
    from secateur.criteria.synflow import SynFlow
    from secateur.criteria.taylor import Taylor
    from secateur.criteria.wanda import Wanda
    from secateur.errors import SecateurError
    from secateur.lab.explore.ask import search_variants
    from secateur.lab.explore.mask_cut import MaskCut, cut_by_mask
    from secateur.lab.oneshot import PruneReport, prune_units_, prune_weights
    from secateur.regularizers.base import Regularizer, WeightNoise
    from secateur.regularizers.ddrop import DDrop
    from secateur.regularizers.ddrop_scale import DDropScale
    from secateur.regularizers.dropout import Dropout
    from secateur.regularizers.gradual_pruning import GradualPruning
    from secateur.regularizers.irrelevance import Irrelevance
    from secateur.regularizers.l0 import L0
    from secateur.regularizers.l1 import L1
    from secateur.regularizers.mask_pool import MaskPoolDropout, unit_mask
    from secateur.regularizers.network_slimming import NetworkSlimming
    from secateur.regularizers.none import NoRegularizer
    from secateur.regularizers.pgmpf import PGMPF
    from secateur.regularizers.smallify import Smallify
    from secateur.regularizers.soft_filter_pruning import SoftFilterPruning
    from secateur.regularizers.targeted_dropout import TargetedDropout
    from secateur.regularizers.variational_dropout import VariationalDropout
    from secateur.search.result import SearchResult
    from secateur.search.run import run_search
    from secateur.search.space import Space
    from secateur.search.spec import SearchSpec
    from secateur.sparsify.iterate import next_masks, next_units
    from secateur.sparsify.ranking import SelectionRule, rank, rank_units
    from secateur.sparsify.rounds import prune_in_rounds
    from secateur.sparsify.sparsifier import Sparsifier
    from secateur.surgery.engine import trace_groups
    from secateur.surgery.file import load_pruned, save_pruned
    from secateur.surgery.plan import Plan, align, make_plan
    from secateur.surgery.verify import cut_verified_, max_difference
    from secateur.variants.evaluate import evaluate_variants
    from secateur.variants.greedy import GreedyOracle, greedy_oracle
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
    from secateur.variants.sensitivity import LayerStep, Sensitivity, sensitivity
    from secateur.variants.unit_choice import UnitsByCriterion
    from secateur.variants.workbench import Workbench

_HOMES = {
    "analysis.connectivity": ("disconnected_layers",),
    "analysis.feature_variance": ("FeatureVariance", "VarianceRatio", "feature_variance", "variance_ratio"),
    "analysis.gradient_flow": ("GradientFlow", "gradient_flow"),
    "analysis.hessian": ("HessianForm", "hessian_form"),
    "analysis.spread": ("Spread", "spread"),
    "analysis.stability": ("LayerCollapse", "LayerOverlap", "MaskOverlap", "collapsed_layers", "mask_overlap"),
    "analysis.weight_cdf": ("WeightCDF", "weight_cdf"),
    "analysis.weight_dependence": ("WeightDependence", "weight_dependence"),
    "variants.sensitivity": ("LayerStep", "Sensitivity", "sensitivity"),
    "search.result": ("SearchResult",),
    "search.run": ("run_search",),
    "search.space": ("Space",),
    "search.spec": ("SearchSpec",),
    "analysis.cost": ("Cost", "compare_costs", "measure_cost"),
    "analysis.latency": ("latency_ratio", "measure_latency"),
    "analysis.mc_dropout": ("MCPrediction", "mc_predict"),
    "core.duration": ("Duration", "Progress"),
    "core.groups": ("Group", "Groups"),
    "core.masks": ("Hold", "Masks"),
    "core.schedule": ("Gradual", "Iterative", "OneShot"),
    "core.select": ("select",),
    "core.targets": ("Target", "Targets", "find_targets"),
    "criteria.apoz": ("APoZ",),
    "criteria.base": ("Criterion", "Evidence"),
    "criteria.bn_gamma": ("BnGamma",),
    "criteria.driver": ("score_targets",),
    "criteria.grasp": ("Grasp",),
    "criteria.lamp": ("Lamp",),
    "criteria.learned": ("Learned",),
    "criteria.magnitude": ("Magnitude",),
    "criteria.mean_activation": ("MeanActivation",),
    "criteria.oracle": ("Oracle",),
    "criteria.random": ("Random",),
    "criteria.saliency": ("Saliency",),
    "criteria.snip": ("Snip",),
    "criteria.synflow": ("SynFlow",),
    "criteria.taylor": ("Taylor",),
    "criteria.wanda": ("Wanda",),
    "errors": ("SecateurError",),
    "lab.explore.ask": ("search_variants",),
    "lab.explore.mask_cut": ("MaskCut", "cut_by_mask"),
    "lab.oneshot": ("PruneReport", "prune_units_", "prune_weights"),
    "regularizers.base": ("Regularizer", "WeightNoise"),
    "regularizers.ddrop": ("DDrop",),
    "regularizers.ddrop_scale": ("DDropScale",),
    "regularizers.dropout": ("Dropout",),
    "regularizers.gradual_pruning": ("GradualPruning",),
    "regularizers.irrelevance": ("Irrelevance",),
    "regularizers.l0": ("L0",),
    "regularizers.l1": ("L1",),
    "regularizers.mask_pool": ("MaskPoolDropout", "unit_mask"),
    "regularizers.network_slimming": ("NetworkSlimming",),
    "regularizers.none": ("NoRegularizer",),
    "regularizers.pgmpf": ("PGMPF",),
    "regularizers.smallify": ("Smallify",),
    "regularizers.soft_filter_pruning": ("SoftFilterPruning",),
    "regularizers.targeted_dropout": ("TargetedDropout",),
    "regularizers.variational_dropout": ("VariationalDropout",),
    "sparsify.iterate": ("next_masks", "next_units"),
    "sparsify.ranking": ("SelectionRule", "rank", "rank_units"),
    "sparsify.rounds": ("prune_in_rounds",),
    "sparsify.sparsifier": ("Sparsifier",),
    "surgery.engine": ("trace_groups",),
    "surgery.file": ("load_pruned", "save_pruned"),
    "surgery.plan": ("Plan", "align", "make_plan"),
    "surgery.verify": ("cut_verified_", "max_difference"),
    "variants.evaluate": ("evaluate_variants",),
    "variants.greedy": ("GreedyOracle", "greedy_oracle"),
    "variants.kinds": (
        "DropLayer",
        "DropUnit",
        "DropUnits",
        "LayerSparsity",
        "NoisyPrune",
        "UnitMasks",
        "Variant",
        "variant_from",
    ),
    "variants.outcome": ("Outcome",),
    "variants.race": ("Arm", "RaceResult"),
    "variants.pareto_race": ("FrontArm", "FrontResult"),
    "variants.racing": ("race_front", "race_variants"),
    "variants.unit_choice": ("UnitsByCriterion",),
    "variants.workbench": ("Workbench",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "L0",
    "L1",
    "PGMPF",
    "APoZ",
    "Arm",
    "BnGamma",
    "Cost",
    "Criterion",
    "DDrop",
    "DDropScale",
    "DropLayer",
    "DropUnit",
    "DropUnits",
    "Dropout",
    "Duration",
    "Evidence",
    "FeatureVariance",
    "FrontArm",
    "FrontResult",
    "GradientFlow",
    "Gradual",
    "GradualPruning",
    "Grasp",
    "GreedyOracle",
    "Group",
    "Groups",
    "HessianForm",
    "Hold",
    "Irrelevance",
    "Iterative",
    "Lamp",
    "LayerCollapse",
    "LayerOverlap",
    "LayerSparsity",
    "LayerStep",
    "Learned",
    "MCPrediction",
    "Magnitude",
    "MaskCut",
    "MaskOverlap",
    "MaskPoolDropout",
    "Masks",
    "MeanActivation",
    "NetworkSlimming",
    "NoRegularizer",
    "NoisyPrune",
    "OneShot",
    "Oracle",
    "Outcome",
    "Plan",
    "Progress",
    "PruneReport",
    "RaceResult",
    "Random",
    "Regularizer",
    "Saliency",
    "SearchResult",
    "SearchSpec",
    "SecateurError",
    "SelectionRule",
    "Sensitivity",
    "Smallify",
    "Snip",
    "SoftFilterPruning",
    "Space",
    "Sparsifier",
    "Spread",
    "SynFlow",
    "Target",
    "TargetedDropout",
    "Targets",
    "Taylor",
    "UnitMasks",
    "UnitsByCriterion",
    "VarianceRatio",
    "Variant",
    "VariationalDropout",
    "Wanda",
    "WeightCDF",
    "WeightDependence",
    "WeightNoise",
    "Workbench",
    "__version__",
    "align",
    "collapsed_layers",
    "compare_costs",
    "cut_by_mask",
    "cut_verified_",
    "disconnected_layers",
    "evaluate_variants",
    "feature_variance",
    "find_targets",
    "gradient_flow",
    "greedy_oracle",
    "hessian_form",
    "latency_ratio",
    "load_pruned",
    "make_plan",
    "mask_overlap",
    "max_difference",
    "mc_predict",
    "measure_cost",
    "measure_latency",
    "next_masks",
    "next_units",
    "prune_in_rounds",
    "prune_units_",
    "prune_weights",
    "race_front",
    "race_variants",
    "rank",
    "rank_units",
    "run_search",
    "save_pruned",
    "score_targets",
    "search_variants",
    "select",
    "sensitivity",
    "spread",
    "trace_groups",
    "unit_mask",
    "variance_ratio",
    "variant_from",
    "weight_cdf",
    "weight_dependence",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(importlib.import_module(f"secateur.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
