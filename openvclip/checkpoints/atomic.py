"""Write files and folders atomically: after a crash, the old or the new content is complete."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from openvclip.errors import CheckpointError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename it to ``path`` after the block.

    The content is flushed to disk before the rename. After a crash, ``path`` is therefore the
    complete old file or the complete new file. After an exception in the block, the temporary file
    is removed and ``path`` is unchanged.

    Args:
        path: the file to write. An existing file is replaced. Missing folders are created.

    Raises:
        IsADirectoryError: ``path`` is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    # Processes in two containers can have the same id, and so have the threads of one process.
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


_COMPLETE = ".openvclip-complete"  # a folder of files that are complete and get their places
_UNFINISHED = ".openvclip-unfinished-"
_ABANDONED = 86400  # seconds after which a temporary folder was left by a kill
_REMOVED = ".remove-"  # before the name of an old file, in a complete folder
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
_CANT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)
_turn = threading.Lock()


@contextmanager
def atomic_folder(
    path: str | os.PathLike[str], outdated: Callable[[set[str]], set[str]] | None = None
) -> Iterator[Path]:
    """Yield a temporary folder, and move its files to ``path`` after the block.

    The temporary folder lies inside of ``path``. When its files are complete and on the disk, one
    rename marks the folder as complete, and then the files are moved one by one. A kill before the
    rename leaves the old files. After a kill between two moves, :func:`finish_folder` moves the
    other files. A reader that calls :func:`finish_folder` first therefore reads the old files or
    the new files, never some of both.

    Other files in ``path`` are not changed. After an exception in the block, ``path`` has its old
    files.

    Args:
        path: the folder to write. Missing folders are created.
        outdated: function from the names of the new files to the names of old files in ``path``
            that are removed when the new files have their places. Default: none.

    Raises:
        OSError: the folder can't be written.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    finish_folder(folder)
    for left in list(folder.glob(f"{_UNFINISHED}*")):
        with suppress(FileNotFoundError):  # another thread has finished its folder
            if time.time() - left.stat().st_mtime > _ABANDONED:
                shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        yield temporary
        files = {entry.name for entry in temporary.iterdir()}
        for name in (outdated(files) if outdated else set()) - files:
            (temporary / f"{_REMOVED}{name}").touch()
        for entry in temporary.iterdir():
            _flush(entry)
        _flush(temporary)
        _complete(temporary, folder)
        finish_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _complete(temporary: Path, folder: Path) -> None:
    """Mark a temporary folder as complete, after the files of an earlier complete folder moved."""
    while True:
        finish_folder(folder)
        try:
            os.rename(temporary, folder / _COMPLETE)
        except OSError as error:
            if error.errno not in _NOT_EMPTY:
                raise
        else:  # otherwise another process has completed its folder in between
            _flush(folder)
            return


def finish_folder(path: str | os.PathLike[str]) -> None:
    """Move the files of a complete :func:`atomic_folder` to their places, if a kill left some.

    Files of which another process has moved some are moved as well. This function changes nothing
    in a folder that is whole.

    Raises:
        OSError: the files can't be moved.
    """
    with _turn:  # of two threads, one waits for the other
        _move_files(Path(path))


def _move_files(folder: Path) -> None:
    complete = folder / _COMPLETE
    if not complete.is_dir():
        return
    # New files first: the old files are removed when nothing refers to them.
    try:
        entries = sorted(complete.iterdir(), key=lambda entry: entry.name.startswith(_REMOVED))
    except FileNotFoundError:  # another process moved all files
        return
    for entry in entries:
        with suppress(FileNotFoundError):  # another process moved the file
            if entry.name.startswith(_REMOVED):
                (folder / entry.name.removeprefix(_REMOVED)).unlink(missing_ok=True)
                entry.unlink()
            else:
                os.replace(entry, folder / entry.name)
    _flush(folder)
    try:
        complete.rmdir()
    except FileNotFoundError:  # another process removed it
        pass
    except OSError as error:
        if error.errno not in _NOT_EMPTY:
            raise  # otherwise another process has completed a folder, and moves its files


def write_text(path: str | os.PathLike[str], parts: Iterable[str]) -> int:
    """Write a text file atomically, in UTF-8.

    The bytes of a file name that are no text, which Python keeps as surrogates, are written as
    backslash escapes.

    Args:
        path: the file to write. An existing file is replaced. Missing folders are created.
        parts: the text in pieces, so that a large text needs little memory.

    Returns:
        The size of the file in bytes.

    Raises:
        CheckpointError: the file can't be written.
    """
    with write_errors(path), atomic_path(path) as temporary:
        with open(
            temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n"
        ) as file:
            file.writelines(parts)
        return os.path.getsize(temporary)


@contextmanager
def write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise a :class:`CheckpointError` if writing ``path`` fails in the block."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"Could not write {os.fspath(path)}: {error}. An existing file is unchanged; check "
            "free space and permissions."
        ) from error


def _flush(path: Path) -> None:
    if path.is_dir():
        _flush_folder(path)
        return
    # Windows flushes only files that are open for writing.
    _flush_open(os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY))


def _flush_folder(path: Path) -> None:
    if os.name == "nt":
        return  # Windows can't open a folder
    try:
        _flush_open(os.open(path, os.O_RDONLY))
    except OSError as error:
        # Shared folders of VirtualBox and some network file systems can't flush a folder, and a
        # folder without the permission to read can't be opened.
        if error.errno not in _CANT_FLUSH:
            raise


def _flush_open(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
