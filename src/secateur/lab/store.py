"""Content-addressed stages: a stage is named by everything that determines its result, and done once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from secateur._version import __version__
from secateur.errors import BusyError, CheckpointError, StorageError
from secateur.lab.checkpoint import write_atomically
from secateur.lab.recipe import canonical_hash

__all__ = ["Planned", "Stage", "Store", "locked", "read_json", "write_json"]


@contextmanager
def locked(folder: Path, wait: float) -> Iterator[None]:
    """Hold `folder` against other processes; `BusyError` if that takes longer than `wait` seconds (-1: forever)."""
    lock = FileLock(folder / ".lock", timeout=wait)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise BusyError(f"{folder} is in use by another process; wait for it, or choose another --out") from error
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}; choose another --out") from error
    try:
        yield
    finally:
        lock.release()


def write_json(path: Path, data: Any) -> None:
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())


def read_json(path: Path, remedy: str = "delete it to redo that stage") -> Any:
    """The JSON in a file; `CheckpointError`, which ends with `remedy`, if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: truncated or not JSON ({error}); {remedy}") from error


@dataclass(frozen=True)
class Planned:
    """One stage of a run and whether it is done already."""

    title: str
    key: str
    done: bool


class Store:
    """A folder of stages, shared by every run under the same output folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def stage(self, kind: str, spec: Mapping[str, Any]) -> Stage:
        """The stage of this kind that `spec` (plain JSON: everything its result depends on) determines."""
        return Stage(self.root, kind, {"secateur": __version__, "kind": kind, **spec})


class Stage:
    """One unit of work. `result.json` exists if and only if it is complete."""

    def __init__(self, root: Path, kind: str, spec: dict[str, Any]) -> None:
        self.kind, self.spec = kind, spec
        self.key = canonical_hash(spec)[:16]
        self.folder = root / f"{kind}-{self.key}"

    @property
    def done(self) -> bool:
        return (self.folder / "result.json").is_file()

    def result(self, **expected: type) -> dict[str, Any]:
        """What `finish` stored.

        Raises: `CheckpointError` unless it is an object that has every `expected` key with a value of that type.
        """
        found = read_json(self.folder / "result.json")
        if not isinstance(found, dict):
            raise self.damaged(f"expected a JSON object, got {type(found).__name__}")
        for key, kind in expected.items():
            # What is written as 1.0 stays 1.0, but other writers of JSON may not keep to that.
            if not isinstance(found.get(key), (int, float) if kind is float else kind):
                got = f"a {type(found[key]).__name__}" if key in found else f"only {', '.join(found) or 'nothing'}"
                raise self.damaged(f'expected "{key}" ({kind.__name__}), got {got}')
        return found

    def damaged(self, what: str) -> CheckpointError:
        """The error for a result that is not what `finish` stored."""
        return CheckpointError(f"{self.folder / 'result.json'}: {what}; delete it to redo that stage")

    @contextmanager
    def work(self) -> Iterator[None]:
        """Hold the stage while working on it; another process that wants it waits."""
        with locked(self.folder, wait=-1):
            for leftover in self.folder.glob(".*.partial"):  # of a process killed while writing
                leftover.unlink(missing_ok=True)
            if not (self.folder / "stage.json").is_file():
                write_json(self.folder / "stage.json", self.spec)
            yield

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        write_json(self.folder / "result.json", dict(result))
        return dict(result)

    def forget(self) -> None:
        """Delete what the stage holds, so that it is done again; waits for a process that is working on it."""
        if not self.folder.is_dir():
            return
        with locked(self.folder, wait=-1):
            # The result goes first and the lock stays: others must neither trust half a stage nor enter it.
            (self.folder / "result.json").unlink(missing_ok=True)
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()
