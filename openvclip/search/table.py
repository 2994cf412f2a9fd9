"""The table of an index: a SQLite file with the videos, their windows and the shards.

The commit of a SQLite transaction is the only moment at which an index changes. Shards are written
before the commit that names them, and removed after the commit that no longer names them.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from openvclip.errors import SearchError

__all__ = ["SCHEMA", "TABLE_FILE", "change_counter", "path_of", "reading", "stored_path", "writing"]

TABLE_FILE = "table.sqlite"

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE shards (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- the number in the name of the file, never used twice
    first INTEGER NOT NULL,                -- the row of its first vector
    rows INTEGER NOT NULL,
    width INTEGER NOT NULL                 -- the length of a vector
);
CREATE TABLE videos (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    path TEXT NOT NULL UNIQUE,
    size INTEGER,                          -- bytes
    mtime INTEGER,                         -- nanoseconds
    duration REAL NOT NULL,                -- seconds
    windows INTEGER NOT NULL
);
CREATE TABLE windows (
    row INTEGER PRIMARY KEY,               -- rows without a window belong to removed videos
    video INTEGER NOT NULL,
    start REAL NOT NULL,                   -- seconds
    end REAL NOT NULL                      -- seconds
);
"""
_SYNCHRONOUS = "FULL"  # a commit is on the disk when it returns
_PATIENCE = 30.0  # seconds to wait for the commit of another process
_COUNTER = slice(24, 28)  # the counter of changes in the header of a SQLite file
_opened: dict[tuple[int, int], int] = {}  # descriptors by device and number of the file
_turn = threading.Lock()


def stored_path(path: str) -> str | bytes:
    """Return a path as SQLite stores it: a text, or bytes if the path is no valid Unicode."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return path


def path_of(stored: str | bytes) -> str:
    """Return the path that :func:`stored_path` stored."""
    return os.fsdecode(stored) if isinstance(stored, bytes) else stored


def change_counter(folder: Path) -> bytes:
    """Return bytes that change with each commit, and if the table is made anew.

    The file is opened once and not closed: on POSIX, closing any descriptor of a file drops all
    locks of the process on this file, also those of SQLite in another thread.

    Raises:
        OSError: the table can't be read.
    """
    path = folder / TABLE_FILE
    if not hasattr(os, "pread"):  # Windows, where a lock belongs to its descriptor
        return path.read_bytes()[_COUNTER]
    status = path.stat()
    file = (status.st_dev, status.st_ino)
    with _turn:
        if file not in _opened:
            _close_removed()
            descriptor = os.open(path, os.O_RDONLY)
            status = os.fstat(descriptor)
            file = (status.st_dev, status.st_ino)
            _opened.setdefault(file, descriptor)
        return os.pread(_opened[file], 4, _COUNTER.start) + repr(file).encode()


def _close_removed() -> None:
    """Close the descriptors of tables that no folder holds any more."""
    for file, descriptor in list(_opened.items()):
        if os.fstat(descriptor).st_nlink == 0:
            os.close(_opened.pop(file))


@contextmanager
def reading(folder: Path) -> Iterator[sqlite3.Connection]:
    """Context manager for one consistent view of the table.

    Raises:
        SearchError: the table can't be read.
    """
    with _errors_of(folder), closing(_connect_to_read(folder)) as connection:
        connection.execute("BEGIN")
        yield connection


@contextmanager
def writing(folder: Path) -> Iterator[sqlite3.Connection]:
    """Context manager for a connection that changes the table. Each block ``with connection`` is
    one transaction.

    Raises:
        SearchError: the table can't be written.
    """
    with _errors_of(folder), closing(_connect(folder, "rwc")) as connection:
        connection.execute(f"PRAGMA synchronous = {_SYNCHRONOUS}")
        yield connection


def _connect(folder: Path, mode: str, more: str = "") -> sqlite3.Connection:
    path = os.fsencode(os.path.abspath(folder / TABLE_FILE))  # also if it is no valid Unicode
    address = f"file:{quote(path)}?mode={mode}{more}"
    return sqlite3.connect(address, uri=True, timeout=_PATIENCE, isolation_level=None)


def _connect_to_read(folder: Path) -> sqlite3.Connection:
    """Return a connection that can read the table.

    After a kill in the middle of a commit, SQLite undoes the commit, for which it must write. In a
    folder that is not writable, nothing is left of a commit, and no lock may be possible.
    """
    journal = folder / f"{TABLE_FILE}-journal"
    modes = [("rw", ""), ("ro", "")]
    if not journal.exists():
        modes.append(("ro", "&immutable=1"))
    for mode, more in modes[:-1]:
        connection = None
        try:
            connection = _connect(folder, mode, more)
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except sqlite3.OperationalError as error:
            if connection is not None:
                connection.close()
            if "locked" in str(error):
                raise
        else:
            return connection
    return _connect(folder, *modes[-1])


@contextmanager
def _errors_of(folder: Path) -> Iterator[None]:
    """Raise the errors of SQLite as :class:`SearchError`."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        raise SearchError(f"{folder / TABLE_FILE}: {_advice(str(error))}") from error


def _advice(message: str) -> str:
    if "full" in message or "disk I/O" in message:
        return (
            f"can't be written ({message}). The index has the videos of the last commit. Check the "
            "free space, then run the command again."
        )
    if "readonly" in message or "unable to open" in message:
        return (
            f"can't be opened ({message}). A process was killed while it changed the index, or "
            "the permissions are missing. Open the index once with write access."
        )
    if "locked" in message:
        return f"is in use by another process ({message}). Try again when that process has ended."
    return f"is damaged ({message}). Copy the index again, or make a new one."
