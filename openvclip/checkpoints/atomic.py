"""Write files atomically: after a crash, the old file or the new file exists, and is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
    if path.is_dir() and os.name == "nt":
        return  # Windows can't open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
