"""The command line: parse, call the lab, print. Nothing below this package prints or exits."""

from __future__ import annotations

from secateur.cli.main import main

__all__ = ["main"]
