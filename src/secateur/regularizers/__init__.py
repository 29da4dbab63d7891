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
    },
)
