"""Spellings that can be checked without torch."""

from __future__ import annotations

import re

from secateur.errors import UnknownNameError

__all__ = ["check_granularity"]

_FORMS = (r"weight", r"unit", r"block:[1-9]\d*x[1-9]\d*", r"[1-9]\d*:[1-9]\d*")


def check_granularity(text: str) -> None:
    """Raise `UnknownNameError` unless `text` spells a granularity.

    Examples:
        >>> check_granularity("2:4")
    """
    if not any(re.fullmatch(form, text) for form in _FORMS):
        raise UnknownNameError("granularity", text, ["weight", "unit", "block:ROWSxCOLUMNS", "N:M"])
