"""Importance scores: one frozen dataclass each, one method to write, one driver for all.

Importing this package imports no torch, so that the command line can list the criteria at once.
"""

from __future__ import annotations

from secateur.registry import Registry

__all__ = ["CRITERIA"]

CRITERIA = Registry(
    kind="criterion",
    group="secateur.criteria",
    builtin={
        "magnitude": "secateur.criteria.magnitude:Magnitude",
        "random": "secateur.criteria.random:Random",
        "bn_gamma": "secateur.criteria.bn_gamma:BnGamma",
        "mean_activation": "secateur.criteria.mean_activation:MeanActivation",
        "taylor": "secateur.criteria.taylor:Taylor",
        "saliency": "secateur.criteria.saliency:Saliency",
        "lamp": "secateur.criteria.lamp:Lamp",
        "apoz": "secateur.criteria.apoz:APoZ",
        "snip": "secateur.criteria.snip:Snip",
        "grasp": "secateur.criteria.grasp:Grasp",
        "synflow": "secateur.criteria.synflow:SynFlow",
        "wanda": "secateur.criteria.wanda:Wanda",
        "learned": "secateur.criteria.learned:Learned",
        "oracle": "secateur.criteria.oracle:Oracle",
    },
)
