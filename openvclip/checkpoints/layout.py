"""The layout of safetensors files, single and sharded: headers that are taken at their word never.

A file is eight bytes with the length of its header, the header (JSON that gives each entry a dtype,
a shape and its place), and the entries' bytes one after the other. A sharded model is several such
files and an index, JSON whose ``weight_map`` says which file holds which entry.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openvclip.errors import CheckpointError
from openvclip.weights.names import listed

INDEX_ENDING = ".safetensors.index.json"

_LONGEST_HEADER = 100_000_000  # bytes; as the safetensors library has it
_LONGEST_INDEX = 100_000_000
_METADATA = "__metadata__"  # the one name in a header that is no entry's
_TOTAL_SIZE = "total_size"  # the one name in an index's metadata that is no text of the model's

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """What stands before the entries of a safetensors file.

    Attributes:
        sizes: the entries in the order of their bytes, as tensors on the meta device.
        starts: where the bytes of each entry begin in the file.
        metadata: the texts.
        length: bytes before those of the first entry.
    """

    sizes: dict[str, Tensor]
    starts: dict[str, int]
    metadata: dict[str, str]
    length: int


class _LieError(Exception):
    """What is wrong with a header or an index."""


# --- headers -------------------------------------------------------------------------------------


def read_header(file: Path) -> Header:
    """Read and check the header of a safetensors file.

    Every byte of the file must belong to the header or to exactly one entry, and every entry must
    have as many bytes as its shape and dtype need; so a file that is cut off or has a byte too
    many is found out here.

    Raises:
        CheckpointError: the file can't be read, or is not a whole safetensors file.
    """
    try:
        with file.open("rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(8), "little")
            try:
                if size < 8:
                    raise _LieError("it ends before its header begins")
                if length > min(size - 8, _LONGEST_HEADER):
                    raise _LieError(f"its header would have {length} bytes")
                return _header(opened.read(length), size)
            except _LieError as lie:
                raise CheckpointError(
                    f"{file} ({size} bytes) is not a whole safetensors file: {lie}. Copy or "
                    "download it again."
                ) from lie
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"Can't read {file}: {type(error).__name__}: {error}.") from error


def _header(text: bytes, file_size: int) -> Header:
    entries = _json_object(text, "its header")
    metadata = _texts(entries.pop(_METADATA, {}))
    places = {name: _place(name, entry) for name, entry in entries.items()}
    # An entry without elements has no bytes, and may stand on the border of two others.
    order = sorted(places, key=lambda name: places[name][1:])
    end = 0
    for name in order:
        _, begin, stop = places[name]
        if begin != end:
            trouble = "overlap those of" if begin < end else f"leave {begin - end} bytes after"
            raise _LieError(f"the bytes of {name!r} {trouble} the entries before it")
        end = stop
    length = 8 + len(text)
    if length + end != file_size:
        raise _LieError(f"by its header it should have {length + end} bytes")
    return Header(
        {name: places[name][0] for name in order},
        {name: length + places[name][1] for name in order},
        metadata,
        length,
    )


def _place(name: str, entry: object) -> tuple[Tensor, int, int]:
    """An entry without its data, and where its bytes begin and end, counted from the first's."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _LieError(f"{name!r} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _LieError(f"{name!r} is of dtype {dtype}, which PyTorch has no weights in")
    if not _are_counts(shape):
        raise _LieError(f"{name!r} has the shape {str(shape)[:80]}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _LieError(f"{name!r} has the data_offsets {str(offsets)[:80]}")
    begin, end = offsets
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != needed:
        raise _LieError(
            f"{name!r} has {end - begin} bytes, but {dtype} of shape {str(shape)[:80]} needs "
            f"{str(needed)[:40]}"
        )
    try:
        return torch.empty(shape, dtype=_DTYPES[dtype], device="meta"), begin, end
    except (RuntimeError, TypeError) as error:  # sizes beyond 64 bits beside a size of 0
        raise _LieError(f"{name!r} has the shape {str(shape)[:80]}") from error


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _texts(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _LieError(f"its {_METADATA} is not a mapping of texts")
    return metadata


def _json_object(text: bytes, what: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise _LieError(f"{what} has {listed([repr(name) for name in twice])} twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise _LieError(f"{what} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise _LieError(f"{what} is not a JSON object")
    return value


def header_bytes(sizes: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds these entries, in this order, after them.

    Args:
        sizes: the entries, with or without data.
        metadata: texts.
    """
    if _METADATA in sizes:
        raise CheckpointError(f"No entry of a safetensors file can have the name {_METADATA!r}.")
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, size in sizes.items():
        begin, end = end, end + size.nbytes
        code = _CODES[size.dtype]
        header[name] = {"dtype": code, "shape": list(size.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the entries' bytes are aligned
    if len(text) > _LONGEST_HEADER:
        raise CheckpointError(
            f"The header would have {len(text)} bytes, more than the {_LONGEST_HEADER} that "
            "readers of safetensors take; give less metadata or write more shards."
        )
    return len(text).to_bytes(8, "little") + text


def require_storable(dtype: torch.dtype) -> None:
    """Raise where safetensors files have no entries of ``dtype``.

    Raises:
        CheckpointError: there are none.
    """
    if dtype not in _CODES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _CODES)
        raise CheckpointError(f"dtype={dtype}: safetensors files hold {names}.")


# --- sharded models ------------------------------------------------------------------------------


def read_shards(file: Path) -> tuple[dict[Path, Header], dict[str, str]]:
    """The safetensors files that make up a model, each with its header, and their texts.

    The texts of a sharded model are those of its shards and those of its index, which speaks for
    the whole where two have the same name.

    Args:
        file: a safetensors file, which is all of its model, or the index of a sharded one.

    Raises:
        CheckpointError: a file is missing or not whole, or the index and the shards do not agree
            on which entry is where.
    """
    try:
        if is_index(file):
            return _read_index(file)
    except OSError as error:
        raise CheckpointError(f"Can't read {file}: {type(error).__name__}: {error}.") from error
    header = read_header(file)
    return {file: header}, header.metadata


def is_index(file: Path) -> bool:
    """Whether the file is JSON that speaks of a ``weight_map``, broken or not."""
    with file.open("rb") as opened:
        if opened.read(64).lstrip()[:1] != b"{":
            return False
        opened.seek(0)
        return b'"weight_map"' in opened.read(_LONGEST_INDEX)


def _read_index(file: Path) -> tuple[dict[Path, Header], dict[str, str]]:
    try:
        index = _json_object(file.read_bytes(), "the index")
        weight_map = _weight_map(index)
    except _LieError as lie:
        raise _broken_index(file, str(lie)) from lie
    shards: dict[Path, Header] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        path = file.with_name(shard)
        if not path.is_file():
            raise _broken_index(file, f"there is no file {shard} beside it")
        shards[path] = read_header(path)
        metadata.update(shards[path].metadata)
        promised = {name for name, where in weight_map.items() if where == shard}
        held = shards[path].sizes.keys()
        for names, trouble in (
            (promised - held, f"{shard} does not hold"),
            (held - promised, f"it does not name what {shard} holds:"),
        ):
            if names:
                raise _broken_index(file, f"{trouble} {listed(sorted(names))}")
    return shards, {**metadata, **_index_texts(index)}


def _weight_map(index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise _LieError("it has no weight_map")
    for name, shard in weight_map.items():
        # A path could lead anywhere on the disk.
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise _LieError(f"{name!r} is to be in {str(shard)[:80]!r}, which is no file beside it")
    return weight_map


def _index_texts(index: dict[str, Any]) -> dict[str, str]:
    """The texts among the metadata of an index, which may hold values of any kind."""
    found = index.get("metadata")
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str) and k != _TOTAL_SIZE}


def shard_names_in(index: Path) -> set[str]:
    """The shards that an index names; none where there is no index, or it is broken."""
    try:
        return set(_weight_map(_json_object(index.read_bytes(), "the index")).values())
    except (OSError, _LieError):
        return set()


def _broken_index(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{file} is not the index of a whole sharded model: {reason}. Copy or download the index "
        "and all shards again."
    )


def index_bytes(shards: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    """The index of a sharded model.

    Args:
        shards: the file name of each shard, and its entries, with or without data.
        metadata: texts.
    """
    total = sum(size.nbytes for sizes in shards.values() for size in sizes.values())
    weight_map = {name: shard for shard, sizes in shards.items() for name in sizes}
    index = {"metadata": {**metadata, _TOTAL_SIZE: total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2) + "\n").encode()
