"""Writing files so that after a crash the old file or the new one is there, whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openvclip.errors import CheckpointError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it takes the name on success.

    The content is flushed to disk before the rename, so that after a crash the old file or the
    new one is there, whole. After an exception the temporary file is removed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise what goes wrong when ``path`` is written as a :class:`CheckpointError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"Could not write {os.fspath(path)}: {error}. Nothing was changed there; check free "
            "space and permissions."
        ) from error


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows keeps no handles of folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
