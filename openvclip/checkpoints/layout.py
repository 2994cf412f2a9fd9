"""The layout of safetensors files. Each header is checked before a value of the file is used.

A safetensors file begins with eight bytes that give the length of its header. The header is JSON
and gives the dtype, the shape and the byte range of each entry. The bytes of the entries follow,
one entry after the other.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openvclip.errors import CheckpointError, listed

_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_LONGEST_READ = 1 << 30  # bytes; macOS reads less than 2 GB at a time
_METADATA = "__metadata__"  # the only name in a header that is not the name of an entry

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
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


class LayoutError(Exception):
    """Raised inside this package if a header or an index is invalid. The text is the reason.

    Callers see a :class:`CheckpointError` that names the file.
    """


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        sizes: names of entries to tensors on the meta device, in the order of their bytes.
        starts: names of entries to the position in the file at which the bytes of the entry begin.
        metadata: the texts of the header.
        length: number of bytes before the first entry.
    """

    sizes: dict[str, Tensor]
    starts: dict[str, int]
    metadata: dict[str, str]
    length: int


@dataclass(frozen=True)
class OpenFile:
    """A safetensors file that is open for reading and whose header was checked.

    Attributes:
        path: the path of the file.
        file: the open file, without a buffer.
        header: the header of the file.
    """

    path: Path
    file: FileIO
    header: Header


# --- reading -------------------------------------------------------------------------------------


def open_file(path: Path, stack: ExitStack) -> OpenFile:
    """Open a safetensors file, and read and check its header.

    Every byte of the file must belong to the header or to exactly one entry. Every entry must have
    as many bytes as its shape and dtype need. A truncated file is therefore found here.

    Args:
        path: the path of the file.
        stack: closes the file.

    Raises:
        CheckpointError: the file can't be read, or it is not a complete safetensors file.
    """
    with read_errors(path):
        file = stack.enter_context(path.open("rb", buffering=0))
        size = os.fstat(file.fileno()).st_size
        try:
            return OpenFile(path, file, _read_header(file, size))
        except LayoutError as error:
            raise CheckpointError(
                f"{path} ({size} bytes) is not a whole safetensors file: {error}. Copy or "
                "download it again."
            ) from error


def read_header(path: Path) -> Header:
    """Return the checked header of a safetensors file. See :func:`open_file`."""
    with ExitStack() as stack:
        return open_file(path, stack).header


def map_entries(opened: OpenFile) -> dict[str, Tensor]:
    """Return the entries of a safetensors file, mapped into memory.

    The values of an entry are read when they are first used. Writing to a tensor does not change
    the file. The tensors stay valid after ``opened.file`` is closed. The file stays mapped until
    the last tensor is deleted.

    Raises:
        CheckpointError: the file can't be mapped.
    """
    header = opened.header
    size = header.length + sum(entry.nbytes for entry in header.sizes.values())
    with read_errors(opened.path):
        memory = mmap.mmap(opened.file.fileno(), size, access=mmap.ACCESS_COPY)
    return {
        name: _map_entry(memory, header.starts[name], entry) for name, entry in header.sizes.items()
    }


def fill(file: FileIO, target: memoryview | bytearray, position: int | None = None) -> None:
    """Read bytes until ``target`` is full.

    Args:
        file: a file that is open for reading.
        target: the memory to fill.
        position: the position of the first byte. Several threads can read a file with ``position``,
            which needs ``os.preadv``. Default: the position of ``file``, which moves.

    Raises:
        OSError: the file ends before ``target`` is full.
    """
    view, filled = memoryview(target), 0
    while filled < len(view):  # one read may return fewer bytes than requested
        if position is None:
            count = file.readinto(view[filled : filled + _LONGEST_READ])
        else:
            part = view[filled : filled + _LONGEST_READ]
            count = os.preadv(file.fileno(), [part], position + filled)
        if not count:
            raise OSError("the file became shorter after it was opened")
        filled += count


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Raise a :class:`CheckpointError` with the name of the file if reading fails in the block."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, MemoryError, ValueError) as error:  # mmap raises ValueError for a shorter file
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"Can't read {path}: {reason}.") from error


def _map_entry(memory: mmap.mmap, start: int, size: Tensor) -> Tensor:
    if not size.numel():
        return torch.empty(size.shape, dtype=size.dtype)
    if start % size.itemsize == 0:
        flat = torch.frombuffer(memory, dtype=size.dtype, count=size.numel(), offset=start)
    else:  # the format allows any position, but PyTorch needs aligned values
        data = torch.frombuffer(memory, dtype=torch.uint8, count=size.nbytes, offset=start)
        flat = data.clone().view(size.dtype)
    return flat.view(size.shape)


def _read_header(file: FileIO, file_size: int) -> Header:
    if file_size < 8:
        raise LayoutError("it ends before its header begins")
    length_bytes = bytearray(8)
    fill(file, length_bytes)
    length = int.from_bytes(length_bytes, "little")
    longest = min(file_size - 8, _LONGEST_HEADER)
    if length > longest:
        raise LayoutError(
            f"its header would have {length} bytes, but at most {longest} are possible"
        )
    text = bytearray(length)
    fill(file, text)
    return _parse_header(bytes(text), file_size)


# --- checks --------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """An entry of a header; ``begin`` and ``end`` count from the end of the header."""

    size: Tensor
    begin: int
    end: int


def _parse_header(text: bytes, file_size: int) -> Header:
    content = json_object(text, "its header")
    metadata = _check_metadata(content.pop(_METADATA, {}))
    entries = {name: _parse_entry(name, fields) for name, fields in content.items()}
    # An entry without elements has no bytes. It may stand between any two other entries.
    names = sorted(entries, key=lambda name: entries[name][1:])
    end = 0
    for name in names:
        begin = entries[name].begin
        if begin < end:
            raise LayoutError(f"the bytes of {name!r} overlap the bytes of the entry before it")
        if begin > end:
            raise LayoutError(f"there is a gap of {begin - end} bytes before the bytes of {name!r}")
        end = entries[name].end
    length = 8 + len(text)
    if length + end != file_size:
        raise LayoutError(f"by its header it should have {length + end} bytes")
    return Header(
        {name: entries[name].size for name in names},
        {name: length + entries[name].begin for name in names},
        metadata,
        length,
    )


def _parse_entry(name: str, fields: object) -> _Entry:
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise LayoutError(f"{name!r} lacks a dtype, a shape or data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise LayoutError(f"{name!r} has the dtype {dtype}, which openvclip does not read")
    shape_error = f"{name!r} has the shape {str(shape)[:80]}; expected a list of sizes"
    if not _are_counts(shape):
        raise LayoutError(shape_error)
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise LayoutError(
            f"{name!r} has the data_offsets {str(offsets)[:80]}; expected a begin and an end"
        )
    begin, end = offsets
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != needed:
        raise LayoutError(
            f"{name!r} has {end - begin} bytes, but {dtype} of shape {str(shape)[:80]} needs "
            f"{str(needed)[:40]}"
        )
    try:
        return _Entry(torch.empty(shape, dtype=_DTYPES[dtype], device="meta"), begin, end)
    except (RuntimeError, TypeError) as error:
        # A shape with a size of 0 needs no bytes. Its other sizes can exceed 64 bits.
        raise LayoutError(shape_error) from error


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise LayoutError(f"its {_METADATA} is not a mapping of texts")
    return metadata


def json_object(text: bytes, subject: str) -> dict[str, Any]:
    """Parse a JSON object and refuse names that occur twice.

    Args:
        text: the JSON.
        subject: what the text is, for the error, such as ``"its header"``.

    Raises:
        LayoutError: the text is not a JSON object, or a name occurs twice in one object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise LayoutError(f"{subject} has {listed([repr(name) for name in twice])} twice")
        return fields

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise LayoutError(f"{subject} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise LayoutError(f"{subject} is not a JSON object")
    return value


# --- writing -------------------------------------------------------------------------------------


def header_bytes(sizes: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file whose entries follow in the order of ``sizes``.

    Args:
        sizes: names to tensors, with or without values.
        metadata: texts to store in the header.

    Raises:
        CheckpointError: an entry has a reserved name, or the header would be too long.
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
    text += b" " * (-len(text) % 8)  # so that the bytes of the entries are aligned
    if len(text) > _LONGEST_HEADER:
        raise CheckpointError(
            f"The header would have {len(text)} bytes, but readers of safetensors files accept at "
            f"most {_LONGEST_HEADER}. Give less metadata, or write more shards."
        )
    return len(text).to_bytes(8, "little") + text


def require_storable(dtype: torch.dtype, name: str = "") -> None:
    """Check that safetensors files can store ``dtype``.

    Args:
        dtype: the dtype of an entry.
        name: the name of the entry, for the error text.

    Raises:
        CheckpointError: safetensors files can't store ``dtype``.
    """
    if dtype not in _CODES:
        names = ", ".join(str(known).removeprefix("torch.") for known in _CODES)
        entry = f"{name} has the " if name else ""
        raise CheckpointError(
            f"{entry}dtype={dtype}: safetensors files hold {names}. Convert the entry to one of "
            "these dtypes first."
        )
