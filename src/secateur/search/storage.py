"""Where a study is kept: in memory, in a SQLite or journal file, or on a server."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock, Timeout
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from secateur.errors import CheckpointError, MissingModuleError, SecateurError, StorageError, UsageError
from secateur.search.location import is_url, location, without_password

__all__ = ["check_storage", "open_study"]

_KEY = "secateur"
_JOURNALS = (".jsonl", ".journal", ".log")
_SQLITE, _LOG = b"SQLite format 3\0", b'{"op_code":'
# Seconds that a process waits for another one's write.
_TIMEOUT = 120


@contextmanager
def open_study(
    where: str | os.PathLike[str] | None, name: str, fingerprint: Mapping[str, Any], directions: Sequence[Any]
) -> Iterator[optuna.Study]:
    """The study of that name, begun if there is none; closed after the block.

    Raises: `CheckpointError` for a study begun with another recipe, or a file that holds none; `StorageError` for a
        file or server that does not answer.
    """
    text = None if where is None else location(where)
    shown = "memory" if text is None else without_password(text)
    storage: BaseStorage | None = None
    try:
        with _quiet(), _opening(text):
            storage = _storage(text, shown)
            study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=list(directions),
                load_if_exists=True,
                # Replaced for every trial; without one, the library would make one that it never uses.
                sampler=optuna.samplers.RandomSampler(seed=0),
            )
            _check(study, fingerprint, shown)
        yield study
    except (StorageInternalError, Timeout) as error:
        raise StorageError(
            f"search: {shown}: {_first_line(error.__cause__ or error)}; run it again once it can be written"
        ) from error
    finally:
        if isinstance(storage, RDBStorage):
            storage.remove_session()
            storage.engine.dispose()


def check_storage(where: str | os.PathLike[str]) -> None:
    """Raise what `open_study` would for a server that does not answer or a file that holds something else.

    Nothing is written.
    """
    text = location(where)
    with _told(without_password(text)):
        if is_url(text):
            engine = sqlalchemy.create_engine(text)
            try:
                # To ask a SQLite file would make it.
                if engine.dialect.name != "sqlite":
                    engine.connect().close()
            finally:
                engine.dispose()
            return
        path = Path(text).absolute()
        _is_journal(path)
        there = next(parent for parent in path.parents if parent.exists())
        if not os.access(there, os.W_OK):
            raise StorageError(f"search: {path}: {there} cannot be written; name another storage")


def _storage(text: str | None, shown: str) -> BaseStorage:
    if text is None:
        return InMemoryStorage()
    with _told(shown):
        if is_url(text):
            return RDBStorage(text, engine_kwargs={"pool_pre_ping": True})
        path = Path(text).absolute()
        if _is_journal(path):
            # The library's own lock outlives a process that is killed while it holds it.
            lock: Any = _JournalLock(path)
            return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
        return RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": _TIMEOUT}})


@contextmanager
def _told(shown: str) -> Iterator[None]:
    """Errors of libraries and drivers as ours."""
    try:
        yield
    except SecateurError:
        raise
    except ImportError as error:
        cause = error.__cause__ or error
        module = cause.name if isinstance(cause, ImportError) and cause.name else _first_line(error)
        raise MissingModuleError(f"search: {shown}: to talk to such a server", module) from error
    except sqlalchemy.exc.NoSuchModuleError as error:
        raise UsageError(
            f"search: {shown}: {_first_line(error)}; expected a file, or a server as in postgresql://user@host/database"
        ) from error
    except (ValueError, KeyError, AssertionError) as error:
        if is_url(shown):
            raise _unanswered(shown, error) from error
        raise CheckpointError(
            f"search: {shown}: the file is damaged ({_first_line(error)}); move it away to start over"
        ) from error
    except Exception as error:
        # Drivers of databases raise classes of their own.
        raise _unanswered(shown, error) from error


def _unanswered(shown: str, error: Exception) -> StorageError:
    what = "the URL, and that the server runs" if is_url(shown) else "that it can be read and written"
    return StorageError(f"search: {shown}: {_first_line(error)}; check {what}")


def _is_journal(path: Path) -> bool:
    """By what is in the file, and by its name if it is still empty."""
    if path.is_dir():
        raise UsageError(f"search: {path} is a folder, expected a file")
    start = b""
    if path.exists():
        with path.open("rb") as file:
            start = file.read(len(_SQLITE))
    if not start:
        return path.suffix in _JOURNALS
    if start != _SQLITE and not start.startswith(_LOG):
        raise CheckpointError(f"search: {path} is neither a SQLite file nor a journal of studies; use another file")
    if start == _SQLITE and (tables := _tables(path)) and "studies" not in tables:
        raise CheckpointError(f"search: {path} is a database of something else ({tables[0]}); use another file")
    return start != _SQLITE


def _tables(path: Path) -> list[str]:
    """Of a SQLite file; none if it cannot be read, which opening it will tell."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=_TIMEOUT)) as base:
            return [name for (name,) in base.execute("select name from sqlite_master where type = 'table'")]
    except sqlite3.DatabaseError:
        return []


def _mend(path: Path) -> None:
    """Drop a last line that was cut off: what follows it would make the whole file unreadable."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def _guard(path: Path) -> FileLock:
    return FileLock(f"{path}.guard", timeout=_TIMEOUT)


class _JournalLock:
    """A lock that the system releases when its process ends."""

    def __init__(self, path: Path) -> None:
        self._guard = _guard(path)

    def acquire(self) -> bool:
        try:
            self._guard.acquire()
        except Timeout as error:
            raise StorageInternalError(str(error)) from error
        return True

    def release(self) -> None:
        self._guard.release()


@contextmanager
def _opening(text: str | None) -> Iterator[None]:
    """One process at a time makes the tables and the study, and no other writes while a journal is mended."""
    if text is None or is_url(text):
        yield
        return
    path = Path(text).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        journal = _is_journal(path)
    except OSError as error:
        raise StorageError(f"search: {path}: {_first_line(error)}") from error
    with FileLock(f"{path}.opening", timeout=_TIMEOUT):
        if journal and path.exists():
            with _guard(path):
                _mend(path)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, optuna.logging.WARNING))
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _check(study: optuna.Study, fingerprint: Mapping[str, Any], shown: str) -> None:
    asked = json.loads(json.dumps(dict(fingerprint)))
    stored = study.user_attrs.get(_KEY)
    if stored is None:
        if study.get_trials(deepcopy=False):
            raise CheckpointError(
                f'search: study "{study.study_name}" in {shown} was not begun by secateur; name another study'
            )
        study.set_user_attr(_KEY, asked)
        stored = study.user_attrs[_KEY]
    differing = [
        f"{key.removeprefix('basis ')} ({_short(stored.get(key))} there, {_short(asked.get(key))} asked for)"
        for key in sorted(stored.keys() | asked.keys())
        if stored.get(key) != asked.get(key)
    ]
    if differing:
        raise CheckpointError(
            f'search: study "{study.study_name}" in {shown} differs in {"; ".join(differing)}; name another study'
        )


def _short(value: Any) -> str:
    if isinstance(value, dict):
        value = {key: entry for key, entry in value.items() if key != "name"}
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{32,}", value):
        value = f"{value[:8]}..."
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
