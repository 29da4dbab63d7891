"""Train-time methods: attach to any model, remove without a trace.

Importing this package imports no torch, so that the command line can list the methods at once.
"""

from __future__ import annotations

from secateur.registry import Registry

__all__ = ["REGULARIZERS"]

REGULARIZERS = Registry(
    kind="regularizer",
    group="secateur.regularizers",
    builtin={
        "none": "secateur.regularizers.none:NoRegularizer",
        "dropout": "secateur.regularizers.dropout:Dropout",
        "targeted_dropout": "secateur.regularizers.targeted_dropout:TargetedDropout",
        "ddrop": "secateur.regularizers.ddrop:DDrop",
        "ddrop_scale": "secateur.regularizers.ddrop_scale:DDropScale",
        "network_slimming": "secateur.regularizers.network_slimming:NetworkSlimming",
        "mask_pool": "secateur.regularizers.mask_pool:MaskPoolDropout",
        "l1": "secateur.regularizers.l1:L1",
        "irrelevance": "secateur.regularizers.irrelevance:Irrelevance",
        "soft_filter_pruning": "secateur.regularizers.soft_filter_pruning:SoftFilterPruning",
        "pgmpf": "secateur.regularizers.pgmpf:PGMPF",
        "gradual_pruning": "secateur.regularizers.gradual_pruning:GradualPruning",
        "l0": "secateur.regularizers.l0:L0",
        "variational_dropout": "secateur.regularizers.variational_dropout:VariationalDropout",
        "smallify": "secateur.regularizers.smallify:Smallify",
    },
)
