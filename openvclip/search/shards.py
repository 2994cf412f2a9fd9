"""Shards: safetensors files of unit vectors in float16, which are never changed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvclip.checkpoints.atomic import atomic_path
from openvclip.errors import SearchError

__all__ = ["Vectors", "map_shard", "shard_name", "shard_number", "write_shard"]

Vectors = NDArray[np.float16]
"""Vectors of unit length, float16 ``[n, D]``."""

_ENTRY = "vectors"
_LENGTH = struct.Struct("<Q")  # the header of a safetensors file begins with its length
_LONGEST = 100_000  # bytes of a header
_PREFIX, _SUFFIX = "vectors-", ".safetensors"


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"{_PREFIX}{number:06d}{_SUFFIX}"


def shard_number(name: str) -> int | None:
    """Return the number of a shard from its file name, ``None`` for other files."""
    digits = name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    return int(digits) if digits.isdecimal() and shard_name(int(digits)) == name else None


def write_shard(path: Path, parts: Iterable[Vectors], rows: int, width: int) -> None:
    """Write a shard and flush the file to the disk.

    Args:
        path: the file.
        parts: the vectors, in parts of any number of rows.
        rows: number of rows of all parts.
        width: D, the length of a vector.

    Raises:
        OSError: the file can't be written. It does not exist then.
    """
    size = 2 * rows * width
    entry = {"dtype": "F16", "shape": [rows, width], "data_offsets": [0, size]}
    header = json.dumps({_ENTRY: entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the numbers are aligned
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(_LENGTH.pack(len(header)) + header)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype="<f2").data)
        if file.tell() != _LENGTH.size + len(header) + size:
            raise AssertionError(f"{path.name}: the parts have no {rows} rows")


def map_shard(path: Path, rows: int) -> Vectors:
    """Return the vectors of a shard. They are read from the disk when they are used.

    Args:
        path: the file.
        rows: the number of rows that the table has for the shard.

    Raises:
        FileNotFoundError: there is no such file.
        SearchError: the file is damaged.
    """
    try:
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            content: Any = json.loads(file.read(min(length, _LONGEST)))
        entry = content[_ENTRY]
        (begin, end), (found, width) = entry["data_offsets"], entry["shape"]
        start = _LENGTH.size + length
        fits = end - begin == 2 * found * width and start + end <= os.path.getsize(path)
        if entry["dtype"] != "F16" or found != rows or not fits:
            raise ValueError(f"{entry['dtype']} {[found, width]}, {end - begin} bytes")
        if not rows:
            return np.empty((0, width), dtype=np.float16)
        mapped = np.memmap(path, dtype="<f2", mode="r", offset=start + begin, shape=(rows, width))
        return mapped.view(np.ndarray)
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise SearchError(
            f"{path}: no permission to read it; change the file's mode or owner."
        ) from error
    except (OSError, ValueError, TypeError, KeyError, struct.error) as error:
        raise SearchError(
            f"{path}: is damaged ({error}); expected {rows} vectors in float16. Copy the index "
            "again, or make a new one."
        ) from error
