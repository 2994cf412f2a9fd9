"""Files of weights: safe loading and atomic saving."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from openvclip.errors import CheckpointError
from openvclip.state import canonical_state


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


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows keeps no handles of folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Save a state dict as a safetensors file, atomically, under plain names.

    Args:
        state: names (wrappers' prefixes are taken out) to tensors on any device.
        path: the file to write; its folder is made where it is missing.
        dtype: dtype to store floating-point entries in; their own by default.
        metadata: texts to keep in the file's header.

    Raises:
        WeightTypeError, StateMismatchError: ``state`` is not a state dict.
        CheckpointError: the file could not be written; an older file is left as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {
        name: _stored(value.detach(), dtype)
        for name, value in canonical_state(state, "state").items()
    }
    try:
        with atomic_path(path) as temporary:
            save_file(plain, temporary, metadata=dict(metadata or {}))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"Could not write {os.fspath(path)}: {error}. Nothing was changed there; check free "
            "space and permissions."
        ) from error


def _stored(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
    # Entries that share memory (tied weights, views) are written as entries of their own.
    return value.to("cpu", wanted, copy=True, memory_format=torch.contiguous_format)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Load a safetensors file as a state dict on the CPU, under plain names.

    Raises:
        CheckpointError: there is no such file, or it is truncated or of another kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"There is no file {file}; expected a .safetensors file of weights.")
    try:
        return canonical_state(load_file(file), str(file))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file: {error}. "
            "Copy or download it again."
        ) from error
