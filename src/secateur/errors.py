"""Every error secateur raises on purpose, each with the exit code the command line gives it.

One form for all messages: what failed, what was got, what was expected, what to do.
The command line prints exactly that one line; a traceback means a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BusyError",
    "CheckNotMetError",
    "CheckpointError",
    "DataError",
    "DivergedError",
    "EquivalenceError",
    "ExportError",
    "MissingExtraError",
    "MissingModuleError",
    "NoEffectError",
    "PluginError",
    "RecipeError",
    "SecateurError",
    "StorageError",
    "TraceError",
    "UnknownNameError",
    "UsageError",
    "VacuousProofError",
    "nearest",
]


class SecateurError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line exits with.

    Examples:
        >>> str(SecateurError("name 'a\\nb': unknown"))
        "name 'a\\\\nb': unknown"
    """

    exit_code = 1

    def __init__(self, *args: object) -> None:
        # What was given is repeated in messages, and may hold line breaks.
        super().__init__(*(_one_line(arg) if isinstance(arg, str) else arg for arg in args))


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UsageError(SecateurError, ValueError):
    """The caller asked for something impossible or malformed."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe does not validate; the message names file, line or key path, got, expected."""


class UnknownNameError(UsageError):
    """A name that no registry or network knows; the message lists the nearest valid ones."""

    def __init__(self, kind: str, got: str, known: Iterable[str], hint: str = "") -> None:
        known = list(known)
        close = nearest(got, known)
        expected = f"nearest: {', '.join(close)}" if close else f"known: {', '.join(sorted(known)) or 'none'}"
        super().__init__(f'unknown {kind} "{got}"; {expected}' + (f"; {hint}" if hint else ""))
        self.kind, self.got = kind, got


class NoEffectError(UsageError):
    """Nothing matched, or a call would have changed nothing: said aloud instead of done silently."""


class MissingExtraError(SecateurError, ImportError):
    """An optional dependency or a device is not there."""

    exit_code = 3

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency; run: pip install 'secateur[{extra}]'")


class MissingModuleError(MissingExtraError):
    """A Python module is not there that no extra of secateur installs."""

    def __init__(self, what: str, module: str) -> None:
        SecateurError.__init__(self, f"{what}: the Python module {module} is not there; install what provides it")


class CheckNotMetError(SecateurError):
    """A check the caller asked for (`--fail-under`) was not met."""

    exit_code = 5


class PluginError(SecateurError):
    """Code that does not ship with secateur (a criterion, regularizer or network) raised; its cause is chained."""


class DataError(SecateurError):
    """Data that is missing, malformed or out of range."""


class DivergedError(SecateurError):
    """Training produced a loss that is not finite."""


class CheckpointError(SecateurError):
    """A checkpoint or pruned-model file that is truncated, foreign, of another network, or unsafe."""


class TraceError(SecateurError):
    """The dependency engine could not see through the network, or took longer than allowed."""


class EquivalenceError(SecateurError):
    """A cut network does not compute what its masked self computes; nothing was changed."""


class VacuousProofError(EquivalenceError):
    """Masked and cut self agree, but the network says the same whatever it is shown, so nothing is proven."""


class ExportError(SecateurError):
    """An exported network does not compute what its source computes, or could not be exported."""


class BusyError(SecateurError):
    """Another process is using the run directory."""


class StorageError(SecateurError):
    """The disk is full, read-only or not writable."""


def nearest(got: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The up to `count` names in `known` closest to `got`, best first.

    Examples:
        >>> nearest("magnitud", ["taylor", "magnitude"])
        ['magnitude']
    """
    return difflib.get_close_matches(got, list(known), n=count, cutoff=0.4)
