"""Networks by name, buildable again from JSON alone.

Importing this package imports no torch, so that names and summaries are listed at once; a network's own file
is imported when it is built.
"""

from __future__ import annotations

from secateur.lab.models.build import build_model, resolve_builder
from secateur.lab.models.catalog import CATALOG, MODELS, ModelInfo

__all__ = ["CATALOG", "MODELS", "ModelInfo", "build_model", "resolve_builder"]
