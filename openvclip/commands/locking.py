"""Locks on open files: one process at a time has a lock. A lock ends with its process."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

__all__ = ["holder_of", "lock", "unlock"]


def lock(file: BinaryIO) -> None:
    """Lock a file, and write the id of this process into the file.

    No other process, thread or object gets the lock until :func:`unlock`, or the end of the
    process. The file is opened with ``"a+b"`` and without a buffer.

    Raises:
        BlockingIOError: the file is locked.
        OSError: the file system has no locks.
    """
    _take(file)
    _note(file, str(os.getpid()))


def unlock(file: BinaryIO) -> None:
    """Unlock a file that this object locked, and remove the id."""
    _note(file, "")
    _give(file)


def holder_of(path: Path) -> str:
    """Return the id of the process that has the lock, such as ``" (123)"``, or an empty text."""
    with suppress(OSError, ValueError):
        return f" ({int(path.read_bytes())})"
    return ""


def _note(file: BinaryIO, text: str) -> None:
    with suppress(OSError):  # of a full disk: the number is only for the text of an error
        file.seek(0)
        file.truncate()
        file.write(text.encode())


if sys.platform == "win32":
    import msvcrt

    _FAR = 2**30  # a byte that nobody reads: a locked byte can't be read on Windows

    def _take(file: BinaryIO) -> None:
        file.seek(_FAR)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error

    def _give(file: BinaryIO) -> None:
        file.seek(_FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _take(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _give(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
