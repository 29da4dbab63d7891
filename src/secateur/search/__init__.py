"""Search over a few numbers of variants: ask for numbers, tell what they were worth, keep the Pareto front.

Importing this package imports neither torch nor optuna; `run_search` needs the extra `search`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.search.objectives import (
        ACCURACY_AND_GAIN,
        ACCURACY_AND_SPARSITY,
        accuracy_and_gain,
        accuracy_and_sparsity,
    )
    from secateur.search.pareto import crowding, front, hypervolume, hypervolume_series
    from secateur.search.result import SearchResult, TrialRecord
    from secateur.search.run import run_search
    from secateur.search.space import STOCHASTIC_PRUNING, Choice, Float, Int, Space
    from secateur.search.spec import SearchSpec

__all__ = [
    "ACCURACY_AND_GAIN",
    "ACCURACY_AND_SPARSITY",
    "STOCHASTIC_PRUNING",
    "Choice",
    "Float",
    "Int",
    "SearchResult",
    "SearchSpec",
    "Space",
    "TrialRecord",
    "accuracy_and_gain",
    "accuracy_and_sparsity",
    "crowding",
    "front",
    "hypervolume",
    "hypervolume_series",
    "run_search",
]

_HOMES = {
    "ACCURACY_AND_GAIN": "objectives",
    "ACCURACY_AND_SPARSITY": "objectives",
    "STOCHASTIC_PRUNING": "space",
    "Choice": "space",
    "Float": "space",
    "Int": "space",
    "SearchResult": "result",
    "SearchSpec": "spec",
    "Space": "space",
    "TrialRecord": "result",
    "accuracy_and_gain": "objectives",
    "accuracy_and_sparsity": "objectives",
    "crowding": "pareto",
    "front": "pareto",
    "hypervolume": "pareto",
    "hypervolume_series": "pareto",
    "run_search": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
