"""The contracts of plug-ins, as checks that anyone can run against their own criterion or regularizer.

Each check raises `AssertionError` saying what broke and where, and returns None when all is well. They train and
score small networks on the CPU for a few steps and take a second or so (`compiled=True` several).
"""

from __future__ import annotations

from secateur.testing.criterion import check_criterion
from secateur.testing.regularizer import check_regularizer

__all__ = ["check_criterion", "check_regularizer"]
