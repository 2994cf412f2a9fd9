"""Write the weights of a model into a folder: one safetensors file, or shards and an index."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from openvclip.checkpoints.api import save_checkpoint, stored_dtype
from openvclip.checkpoints.atomic import write_errors
from openvclip.checkpoints.layout import read_header
from openvclip.checkpoints.sharding import INDEX_ENDING, index_bytes
from openvclip.checkpoints.streaming.outputs import split_into_shards
from openvclip.errors import UsageError
from openvclip.weights.names import canonical_model


def save_model_file(
    state: Mapping[str, Any],
    folder: str | os.PathLike[str],
    stem: str,
    *,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
) -> str:
    """Save a state dict in a folder, and return the name of the file that stands for the model.

    One file ``STEM.safetensors`` is written, or shards ``STEM-00001-of-00002.safetensors`` and an
    index ``STEM.safetensors.index.json``. The files are written one by one. Use
    :func:`openvclip.checkpoints.atomic_folder` to replace an older model.

    Args:
        state: see :func:`openvclip.save_checkpoint`.
        folder: an existing folder.
        stem: the beginning of the names of the files.
        metadata: texts for the headers. The index has them too.
        dtype: see :func:`openvclip.save_checkpoint`.
        max_shard_size: bytes of the entries of a shard. A larger entry has a shard of its own.
            Default: one file.

    Raises:
        UsageError: ``max_shard_size`` is not a number of bytes.
        CheckpointError, WeightTypeError: see :func:`openvclip.save_checkpoint`.
    """
    require_shard_size(max_shard_size)
    path = Path(folder) / f"{stem}.safetensors"
    entries, extra_state = canonical_model(state, "state")
    sizes = {
        name: torch.empty(value.shape, dtype=stored_dtype(value, dtype), device="meta")
        for name, value in entries.items()
    }
    shards = split_into_shards(sizes, max_shard_size) if max_shard_size else [sizes]
    if len(shards) == 1:
        save_checkpoint(state, path, dtype=dtype, metadata=metadata)
        return path.name
    names = [f"{stem}-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        part = {entry: entries[entry] for entry in shard} | extra_state
        extra_state = {}  # in the first shard only
        save_checkpoint(part, path.with_name(name), dtype=dtype, metadata=metadata)
    index = path.with_name(f"{stem}{INDEX_ENDING}")
    # The headers list the extra state too, which the first shard holds.
    stored = {name: read_header(path.with_name(name)).sizes for name in names}
    with write_errors(index):
        index.write_bytes(index_bytes(stored, metadata))
    return index.name


def require_shard_size(size: object) -> None:
    """Raise :class:`UsageError` unless ``size`` is a number of bytes, or ``None``."""
    if size is not None and (type(size) is not int or size < 1):
        raise UsageError(
            f"max_shard_size={size!r}: expected a number of bytes, such as 5_000_000_000."
        )
