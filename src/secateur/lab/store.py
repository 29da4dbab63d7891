"""Content-addressed stages: a stage is named by everything that determines its result, and done once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from secateur._version import __version__
from secateur.errors import BusyError, CheckpointError, StorageError
from secateur.lab.checkpoint import write_atomically
from secateur.lab.recipe import canonical_hash

__all__ = ["Stage", "Store", "locked", "read_json", "write_json"]


@contextmanager
def locked(folder: Path, wait: float) -> Iterator[None]:
    """Hold `folder` against other processes; `BusyError` if that takes longer than `wait` seconds (-1: forever)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=wait)
        with lock:
            yield
    except Timeout as error:
        raise BusyError(f"{folder} is in use by another process; wait for it, or choose another --out") from error
    except OSError as error:
        # Only what locking itself raises: errors of the work inside arrive as SecateurError or keep their type.
        if error.filename is not None and Path(str(error.filename)).is_relative_to(folder):
            raise StorageError(f"cannot write {error.filename}: {error.strerror}; choose another --out") from error
        raise


def write_json(path: Path, data: Any) -> None:
    write_atomically(path, (json.dumps(data, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: truncated or not JSON ({error}); delete it to redo that stage") from error


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

    def result(self) -> dict[str, Any]:
        """What `finish` stored."""
        return read_json(self.folder / "result.json")

    @contextmanager
    def work(self) -> Iterator[None]:
        """Hold the stage while working on it; another process that wants it waits."""
        with locked(self.folder, wait=-1):
            if not (self.folder / "stage.json").is_file():
                write_json(self.folder / "stage.json", self.spec)
            yield

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        write_json(self.folder / "result.json", dict(result))
        return dict(result)

    def forget(self) -> None:
        """Delete what the stage holds, so that it is done again."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
