"""The lock of an index: one process at a time changes it. A lock ends with its process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from openvclip.errors import SearchError

__all__ = ["LOCK_FILE", "writer_lock"]

LOCK_FILE = "writer.lock"
"""The file that is locked while a process changes the index. It holds the id of the process."""


@contextmanager
def writer_lock(folder: Path) -> Iterator[None]:
    """Context manager in which no other process, thread or object changes an index.

    Args:
        folder: the folder of the index.

    Raises:
        SearchError: another process changes the index, or the folder is not writable.
    """
    try:
        file = (folder / LOCK_FILE).open("a+b", buffering=0)  # nothing is left to write at the end
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SearchError(
            f"{folder}: the folder of the index is gone. If it was moved, open it in its new place."
        ) from error
    except OSError as error:
        raise SearchError(
            f"{folder}: the index can't be changed ({error.strerror}). Searching needs no "
            "permission to write; for changes, give write access, or copy the index."
        ) from error
    with file:
        try:
            _lock(file)
        except BlockingIOError as error:
            raise SearchError(
                f"{folder}: another process{_holder(folder)} is changing this index. Wait until "
                "it ends, then run the command again: videos that are indexed already are skipped."
            ) from error
        except OSError as error:
            raise SearchError(
                f"{folder}: the file system has no locks ({error.strerror}), so two processes "
                "could damage the index. Keep the index on a local disk."
            ) from error
        try:
            _note(file, str(os.getpid()))
            yield
        finally:
            _note(file, "")
            _unlock(file)


def _note(file: BinaryIO, text: str) -> None:
    with suppress(OSError):  # of a full disk: the number is only for the text of an error
        file.seek(0)
        file.truncate()
        file.write(text.encode())


def _holder(folder: Path) -> str:
    with suppress(OSError, ValueError):
        return f" ({int((folder / LOCK_FILE).read_bytes())})"
    return ""


if sys.platform == "win32":
    import msvcrt

    _FAR = 2**30  # a byte that nobody reads: a locked byte can't be read on Windows

    def _lock(file: BinaryIO) -> None:
        file.seek(_FAR)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error

    def _unlock(file: BinaryIO) -> None:
        file.seek(_FAR)
        msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_UN)
