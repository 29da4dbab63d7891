"""Which of the trials asked for a worker takes, so that none is counted twice and none is lost.

The trials asked for are slots 0, 1, ..., total - 1. A study's own trials are attempts at a slot: complete, failed with
a reason (both fill it), running (it is taken), or failed without one (the worker was stopped or killed: it is free
again). Attempts are numbered by the storage, one after the other, and choose in that order, each waiting until those
before it have chosen: this needs no lock, so it is the same in files and on servers.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

__all__ = ["Heartbeat", "Watch", "broken_off", "claim", "filled", "fills", "free_slot", "give_up", "working"]

_MISSED = 6
# Seconds that an attempt may take to choose its slot.
_CHOOSING = 5.0
# Of this process: workers that are in their loop.
_HERE: set[str] = set()


def fills(attempt: FrozenTrial) -> bool:
    """Whether it counts: it has values, or a reason to have none."""
    if "slot" not in attempt.user_attrs:
        return False
    failed = attempt.state == TrialState.FAIL and "reason" in attempt.user_attrs
    return attempt.state == TrialState.COMPLETE or failed


def filled(attempts: Iterable[FrozenTrial]) -> dict[int, FrozenTrial]:
    """The attempt that counts for each slot: the first, should a worker that was given up have come back."""
    slots: dict[int, FrozenTrial] = {}
    for attempt in sorted((a for a in attempts if fills(a)), key=lambda a: a.number):
        slots.setdefault(int(attempt.user_attrs["slot"]), attempt)
    return slots


def free_slot(attempts: Iterable[FrozenTrial], total: int) -> int | None:
    """The first slot that is neither filled nor taken."""
    attempts = list(attempts)
    held = filled(attempts).keys() | {
        int(a.user_attrs["slot"]) for a in attempts if a.state == TrialState.RUNNING and "slot" in a.user_attrs
    }
    return next((slot for slot in range(total) if slot not in held), None)


def claim(study: Study, trial: Trial, total: int, watch: Watch, pause: float = 0.02) -> int | None:
    """The slot this attempt is at; None if all are taken by now, or if this attempt was given up by another worker."""
    while True:
        attempts = study.get_trials(deepcopy=False)
        if attempts[trial.number].state != TrialState.RUNNING:
            return None
        earlier = (a for a in attempts if a.number < trial.number and a.state == TrialState.RUNNING)
        if all("slot" in a.user_attrs for a in earlier):
            break
        watch.release(attempts)
        time.sleep(pause)
    slot = free_slot(attempts, total)
    try:
        if slot is None:
            give_up(study, trial.number)
        else:
            trial.set_user_attr("slot", slot)
    except optuna.exceptions.UpdateFinishedTrialError:
        return None
    return slot


def give_up(study: Study, number: int) -> None:
    """End an attempt without a reason: it does not count."""
    try:
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
    except (optuna.exceptions.UpdateFinishedTrialError, ValueError):
        # Another worker was quicker.
        return


def broken_off(attempts: Iterable[FrozenTrial], slot: int, names: Collection[str]) -> dict[str, Any] | None:
    """The numbers that an earlier attempt at a slot, which was given up, had been proposed."""
    for attempt in attempts:
        lost = attempt.state == TrialState.FAIL and attempt.user_attrs.get("slot") == slot
        if lost and attempt.params.keys() == set(names):
            return dict(attempt.params)
    return None


@contextmanager
def working(interval: float) -> Iterator[dict[str, Any]]:
    """Who runs an attempt, so that its neighbors on the same machine see at once that it is gone."""
    pid, name = os.getpid(), uuid.uuid4().hex[:12]
    _HERE.add(name)
    try:
        yield {"id": name, "machine": _machine(), "pid": pid, "born": _born(pid), "every": interval}
    finally:
        _HERE.discard(name)


class Watch:
    """Gives up attempts whose worker is gone: its process has ended, or it has shown no sign of life for long.

    Args:
        interval: seconds between signs of life, of workers that have not said theirs.

    Time is measured by this worker's own clock, from when it first saw the last sign, so that clocks need not agree.
    """

    def __init__(self, study: Study, interval: float) -> None:
        self._study, self._interval = study, interval
        self._seen: dict[int, tuple[Any, float]] = {}
        self._machine = _machine()

    def release(self, attempts: Iterable[FrozenTrial]) -> bool:
        """Whether any was given up."""
        gone = [a.number for a in attempts if a.state == TrialState.RUNNING and self._is_gone(a)]
        for number in gone:
            give_up(self._study, number)
        return bool(gone)

    def _is_gone(self, attempt: FrozenTrial) -> bool:
        mark = attempt.user_attrs.get("worker")
        if mark and self._machine and mark["machine"] == self._machine:
            if not _lives(mark["pid"], mark["born"]):
                return True
            if mark["pid"] == os.getpid() and mark["id"] not in _HERE:
                return True
        now, sign = time.monotonic(), (attempt.user_attrs.get("beat"), "slot" in attempt.user_attrs)
        if attempt.number not in self._seen or self._seen[attempt.number][0] != sign:
            self._seen[attempt.number] = (sign, now)
        patience = _MISSED * (mark["every"] if mark else self._interval)
        if not sign[1]:
            # It holds up those after it, and loses nothing by being given up: it asks again.
            patience = min(patience, _CHOOSING)
        return bool(now - self._seen[attempt.number][1] > patience)


class Heartbeat:
    """Shows a sign of life every `interval` seconds within the block."""

    def __init__(self, trial: Trial, interval: float) -> None:
        self._trial, self._interval = trial, interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _beat(self) -> None:
        count = 0
        while not self._done.wait(self._interval):
            count += 1
            try:
                self._trial.set_user_attr("beat", count)
            except optuna.exceptions.UpdateFinishedTrialError:
                return
            except Exception:
                # A storage that is busy or away for a moment: the next sign may get through.
                continue


def _machine() -> str:
    """The machine since it was started, and the namespace that process ids are of; "" where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> str | None:
    """When a process was started; None if there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _lives(pid: int, born: str | None) -> bool:
    return _born(pid) == born
