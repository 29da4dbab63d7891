"""Images in memory: data sets by name or folder, and batches that any step can be resumed from.

Importing this package imports no torch; what it exports is loaded when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from secateur.lab.data.catalog import DATASETS, KnownSet

if TYPE_CHECKING:
    from secateur.lab.data.dataset import Dataset, Normalize
    from secateur.lab.data.load import load_data
    from secateur.lab.data.loader import AUGMENTATIONS, Loader, evaluation_batches

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Dataset",
    "KnownSet",
    "Loader",
    "Normalize",
    "evaluation_batches",
    "load_data",
]

_HOMES = {
    "AUGMENTATIONS": "loader",
    "Dataset": "dataset",
    "Loader": "loader",
    "Normalize": "dataset",
    "evaluation_batches": "loader",
    "load_data": "load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
