"""What commands print and how they end: people on stderr, data on stdout, one line per error."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.lab.listener import Listener

__all__ = ["errors_to_exit", "fail", "human", "listening", "out_json", "show_tracebacks", "table"]

# Labels come from recipes: text in square brackets is text, not markup.
human = Console(stderr=True, highlight=False, markup=False)


_STORAGE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}


_DEBUG = ContextVar("debug", default=False)


def show_tracebacks(on: bool) -> None:
    """Whether deliberate errors show where they were raised, before their line."""
    _DEBUG.set(on)


def out_json(data: Any) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps({"schema": 1, **data}, indent=1) + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table for people; plain text when the output is not a terminal."""
    shown = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*("" if cell is None else str(cell) for cell in row))
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160).print(shown)


@contextmanager
def errors_to_exit(as_json: bool = False) -> Iterator[None]:
    """Turn deliberate errors into one line and their exit code. Anything else is a bug and shows a traceback."""
    try:
        yield
    except SecateurError as error:
        if _DEBUG.get():
            traceback.print_exception(error)
        fail(str(error), type(error).__name__, error.exit_code, as_json)
    except KeyboardInterrupt:
        fail("interrupted", "Interrupted", 130, as_json)
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        fail(f"cannot use {error.filename or 'a file'}: {error.strerror}", "StorageError", 1, as_json)


def fail(message: str, kind: str, code: int, as_json: bool) -> NoReturn:
    """Say what failed in one line on stderr (and as JSON on stdout), and leave with `code`."""
    line = " ".join(message.split())
    if as_json:
        out_json({"error": {"type": kind, "message": line, "exit_code": code}})
    sys.stderr.write(f"secateur: {line}\n")
    raise typer.Exit(code)


@contextmanager
def listening(quiet: bool) -> Iterator[Listener]:
    """A listener that shows progress on stderr; the first Ctrl-C or SIGTERM stops at the next safe point."""
    from secateur.lab.listener import Listener

    class Bars(Listener):
        def __init__(self, progress: Progress | None) -> None:
            self._progress = progress
            self._task: TaskID | None = None

        def stage_started(self, title: str, steps: int) -> None:
            if self._progress is not None:
                self._task = self._progress.add_task(title, total=steps or None, note="")

        def advanced(self, step: int, note: str) -> None:
            if self._progress is not None and self._task is not None:
                self._progress.update(self._task, completed=step, note=note)

        def stage_finished(self, title: str, cached: bool) -> None:
            if self._progress is not None and self._task is not None:
                self._progress.remove_task(self._task)
                self._task = None
            if not quiet:
                human.print(f"  {'kept' if cached else 'done'}  {title}")

        def message(self, text: str) -> None:
            if not quiet:
                human.print(f"  ....  {text}")

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    bars = None
    if human.is_terminal and not quiet:
        bars = Progress(
            *columns,
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=human,
            transient=True,
        )
    listener = Bars(bars)
    with _stopping(listener):
        if bars is None:
            yield listener
        else:
            with bars:
                yield listener


@contextmanager
def _stopping(listener: Listener) -> Iterator[None]:
    previous: dict[int, Callable[[int, types.FrameType | None], Any] | int | None] = {}

    def ask(number: int, frame: types.FrameType | None) -> None:
        if listener.stop:
            raise KeyboardInterrupt
        listener.stop = True
        os.write(2, b"\nsecateur: stopping at the next step and saving (again to quit now)\n")

    for wanted in (signal.SIGINT, signal.SIGTERM):
        previous[wanted] = signal.signal(wanted, ask)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
