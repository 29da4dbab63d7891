"""Run a piece of work that may hang, crash or leave traces where it can do none of these to the caller."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable

import torch

__all__ = ["OutOfTime", "WorkFailed", "can_fork", "run_in_fork", "run_in_thread"]


class OutOfTime(Exception):
    """The work did not finish within its time."""


class WorkFailed(Exception):
    """The work raised, or its process died; the message is one line."""


def can_fork() -> bool:
    return hasattr(os, "fork")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def run_in_fork(work: Callable[[], str], seconds: float) -> str:
    """`work()` in a forked child that is killed after `seconds`; nothing it does reaches this process.

    Only text crosses the pipe, so nothing has to be unpickled.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # The child runs one thread, takes no lock the parent's threads may hold, and never returns.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _child(work, reader, writer)
    os.close(writer)
    try:
        answer = _read_all(reader, time.monotonic() + seconds)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not answer:
        raise WorkFailed("the tracing process died (out of memory, or a crash in native code)")
    text = answer[1:].decode()
    if answer[:1] != b"+":
        raise WorkFailed(text)
    return text


def _child(work: Callable[[], str], reader: int, writer: int) -> None:
    try:
        os.close(reader)
        # OpenMP's threads do not survive a fork; one thread needs none of them.
        torch.set_num_threads(1)
        try:
            answer = b"+" + work().encode()
        except BaseException as error:
            answer = b"-" + _one_line(error).encode()
        while answer:
            answer = answer[os.write(writer, answer) :]
    finally:
        os._exit(0)


def _read_all(reader: int, deadline: float) -> bytes:
    chunks: list[bytes] = []
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise OutOfTime
        chunk = os.read(reader, 1 << 20)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)


def run_in_thread(work: Callable[[], str], seconds: float) -> str:
    """`work()` in a daemon thread, abandoned after `seconds`: for systems without `fork`."""
    answer: list[str] = []
    failure: list[str] = []

    def target() -> None:
        try:
            answer.append(work())
        except BaseException as error:
            failure.append(_one_line(error))

    thread = threading.Thread(target=target, daemon=True, name="secateur-trace")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise OutOfTime
    if failure:
        raise WorkFailed(failure[0])
    return answer[0]
