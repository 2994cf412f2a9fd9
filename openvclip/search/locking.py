"""The lock of an index: one process at a time changes it. A lock ends with its process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openvclip.commands.locking import holder_of, lock, unlock
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
            lock(file)
        except BlockingIOError as error:
            raise SearchError(
                f"{folder}: another process{holder_of(folder / LOCK_FILE)} is changing this index. "
                "Wait until it ends, then run the command again: videos that are indexed already "
                "are skipped."
            ) from error
        except OSError as error:
            raise SearchError(
                f"{folder}: the file system has no locks ({error.strerror}), so two processes "
                "could damage the index. Keep the index on a local disk."
            ) from error
        try:
            yield
        finally:
            unlock(file)
