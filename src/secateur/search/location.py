"""Where a study is kept, as text: a path, or the URL of a server."""

from __future__ import annotations

import os
import re

__all__ = ["is_url", "location", "without_password"]


def location(where: str | os.PathLike[str]) -> str:
    """A path or a URL; `sqlite:///FILE` is the path."""
    return os.fspath(where).removeprefix("sqlite:///")


def is_url(text: str) -> bool:
    return "://" in text


def without_password(text: str) -> str:
    """For messages and for files that are kept.

    Examples:
        >>> without_password("postgresql://me:s@cret@host/studies?sslpassword=other&x=1")
        'postgresql://me:***@host/studies?sslpassword=***&x=1'
    """
    text = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", text)
    return re.sub(r"(password=)[^&]*", r"\1***", text, flags=re.IGNORECASE)
