"""Safetensors files that are written entry by entry and get their names when they are complete."""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from openvclip.checkpoints.atomic import atomic_path, write_errors
from openvclip.checkpoints.layout import header_bytes, read_header
from openvclip.checkpoints.sharding import INDEX_ENDING, index_bytes, shard_names_in
from openvclip.checkpoints.streaming.inputs import WeightInput
from openvclip.checkpoints.streaming.provenance import PROVENANCE_KEY
from openvclip.errors import CheckpointError, UsageError
from openvclip.weights.numerics import bytes_of

SHARD_SIZE = 5_000_000_000  # bytes; the default of Hugging Face's libraries
_WRITE_BACK = 16 << 20  # bytes after which the system is asked to write to the disk

Metadata: TypeAlias = Callable[[], Mapping[str, str]]
"""Returns the texts for a header. The texts may change between calls, but not their lengths."""


def in_writing_order(sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sort the entries by the size of their elements, wide dtypes first.

    Then every entry begins at a multiple of the size of its elements, without the gaps that the
    format forbids. The safetensors library sorts in the same way. A file of that library is
    therefore read from its beginning to its end. Entries of equal element size keep their order.
    """
    return dict(sorted(sizes.items(), key=lambda item: -item[1].itemsize))


def check_outputs(outs: list[Path], inputs: list[WeightInput], max_shard_size: int | None) -> None:
    """Raise an error for a wrong output before any file is written.

    Raises:
        CheckpointError: an output has another ending, or would replace a shard of an input.
        UsageError: ``max_shard_size`` has no use, or an output would be written twice.
    """
    input_shards = {
        file.resolve() for source in inputs for file in source.files if file != source.path
    }
    resolved_outs = [out.resolve() for out in outs]
    for out, resolved in zip(outs, resolved_outs, strict=True):
        if not out.name.endswith((".safetensors", INDEX_ENDING)):
            raise CheckpointError(
                f"{out}: the result is a safetensors file. Give a name ending in .safetensors, or "
                f"in {INDEX_ENDING} for shards."
            )
        if max_shard_size is not None and (
            max_shard_size < 1 or not out.name.endswith(INDEX_ENDING)
        ):
            raise UsageError(
                f"max_shard_size={max_shard_size} for {out}: expected a number of bytes, and an "
                f"output whose name ends in {INDEX_ENDING}."
            )
        if resolved in input_shards:
            raise CheckpointError(
                f"{out} is a shard of a model that is read. Replacing it would break that model. "
                "Give another name."
            )
        if resolved_outs.count(resolved) > 1:
            raise UsageError(f"{out} would be written twice; give each output its own name.")


class WeightOutput:
    """The files of one model while its entries are written.

    Args:
        path: the file of the model, for errors.
        shards: the files to fill, one after the other.
    """

    def __init__(self, path: Path, shards: list[_ShardWriter]) -> None:
        self.path = path
        self._places = {name: (shard, at) for shard in shards for name, at in shard.starts.items()}
        self._next_shards = iter(shards)
        self._shard = next(self._next_shards)

    def write(self, flat: Tensor) -> None:
        """Append elements of one dimension. Entries and their elements must come in order."""
        with write_errors(self.path):
            while flat.nbytes and not self._shard.bytes_left:
                self._shard = next(self._next_shards)
            self._shard.append(bytes_of(flat))

    def write_part(self, name: str, start: int, flat: Tensor) -> None:
        """Write elements of an entry from index ``start`` on, in any order, in any thread.

        A model is written with this method or with :meth:`write`, never with both.
        """
        shard, begin = self._places[name]
        with write_errors(self.path):
            shard.write_at(begin + start * flat.itemsize, bytes_of(flat))


@contextmanager
def weight_output(
    path: Path, sizes: Mapping[str, Tensor], metadata: Metadata, max_shard_size: int | None
) -> Iterator[WeightOutput]:
    """Open the files of a model for writing, and name them at the end of the block.

    After an exception, the files are removed. The header of each file is written last, into space
    at the beginning of the file, because the metadata hold hashes that are known only then. An
    incomplete file therefore begins with zeros, and no reader accepts it. A kill shortly before the
    index is renamed can leave the new shards without an index. A kill shortly after the rename can
    leave the older shards. The next write of the index removes these shards if this library wrote
    them.

    Args:
        path: the file to write, or the index of a sharded model.
        sizes: the entries in the order in which they are written, on the meta device.
        metadata: returns the texts for the headers. The texts include the provenance, which marks
            the shards of this library. Called at the beginning and at the end.
        max_shard_size: bytes of the entries of a shard. A larger entry has a shard of its own.
            Default: 5 GB.

    Raises:
        CheckpointError: the files can't be written. Existing files are then unchanged.
    """
    with write_errors(path), ExitStack() as stack:
        if not path.name.endswith(INDEX_ENDING):
            temporary = stack.enter_context(atomic_path(path))
            writer = stack.enter_context(_shard_writer(temporary, sizes, metadata))
            yield WeightOutput(path, [writer])
            return
        parts = split_into_shards(sizes, max_shard_size or SHARD_SIZE)
        names = _new_shard_names(path, len(parts))
        index, files = stack.enter_context(_atomic_shards(path, names))
        yield WeightOutput(
            path,
            [
                stack.enter_context(_shard_writer(file, part, metadata))
                for file, part in zip(files, parts, strict=True)
            ],
        )
        index.write_bytes(index_bytes(dict(zip(names, parts, strict=True)), metadata()))


class _ShardWriter:
    """Appends the bytes of entries to an open file, or writes them at their positions.

    Args:
        file: the file, at the position of the first entry.
        sizes: the entries in their order.
    """

    def __init__(self, file: FileIO, sizes: Mapping[str, Tensor]) -> None:
        self._file = file
        self.starts: dict[str, int] = {}
        end = self._written_back = file.tell()
        for name, size in sizes.items():
            self.starts[name], end = end, end + size.nbytes
        self.bytes_left = end - self._written_back
        self._lock = threading.Lock()
        self._written = 0  # bytes since the system was asked to write to the disk
        self._unflushed: list[tuple[int, int]] = []  # the ranges of these bytes

    def append(self, data: memoryview) -> None:
        self.bytes_left -= len(data)
        _write(self._file, data)
        written = self._file.tell() - self._written_back
        if written >= _WRITE_BACK:
            self._write_back(self._written_back, written)
            self._written_back += written

    def write_at(self, position: int, data: memoryview) -> None:
        """Write bytes at a position. Several threads can call this method at the same time."""
        if not hasattr(os, "pwrite"):  # Windows: a file has one position for all threads
            with self._lock:
                self._file.seek(position)
                _write(self._file, data)
            return
        written = 0
        while written < len(data):
            written += os.pwrite(self._file.fileno(), data[written:], position + written)
        with self._lock:
            self._unflushed.append((position, position + len(data)))
            self._written += len(data)
            if self._written < _WRITE_BACK:
                return
            start = min(first for first, _ in self._unflushed)
            end = max(last for _, last in self._unflushed)
            self._written, self._unflushed = 0, []
        self._write_back(start, end - start)

    def _write_back(self, start: int, count: int) -> None:
        # Linux starts to write pages to the disk if they are declared as no longer needed.
        # The flush at the end then has little left to write.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), start, count, os.POSIX_FADV_DONTNEED)


@contextmanager
def _shard_writer(
    path: Path, sizes: Mapping[str, Tensor], metadata: Metadata
) -> Iterator[_ShardWriter]:
    with path.open("wb", buffering=0) as file:
        header_length = len(header_bytes(sizes, metadata()))
        file.seek(header_length)
        yield _ShardWriter(file, sizes)
        header = header_bytes(sizes, metadata())
        if len(header) != header_length:
            raise AssertionError("the lengths of the metadata changed")
        file.seek(0)
        _write(file, memoryview(header))


def _write(file: FileIO, data: memoryview) -> None:
    written = 0
    while written < len(data):  # one write may accept fewer bytes than given
        written += file.write(data[written:])


# --- shards --------------------------------------------------------------------------------------


def split_into_shards(sizes: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """Return the entries of each shard, in their order.

    Args:
        sizes: the entries of a model.
        limit: bytes of the entries of a shard. A larger entry has a shard of its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    bytes_left = limit
    for name, size in sizes.items():
        if size.nbytes > bytes_left and shards[-1]:
            shards.append({})
            bytes_left = limit
        shards[-1][name] = size
        bytes_left -= size.nbytes
    return shards


def _new_shard_names(index: Path, count: int) -> list[str]:
    """Return names of shards that no file has, so that no shard of an older model is overwritten.

    Every name has a random tag, even if the plain names are free. The tag distinguishes shards that
    a kill left without an index from shards that another program wrote.
    """
    while True:
        tag = secrets.token_hex(4)
        names = [
            f"{_stem(index)}-{tag}-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)
        ]
        if not any(index.with_name(name).exists() for name in names):
            return names


@contextmanager
def _atomic_shards(index: Path, names: list[str]) -> Iterator[tuple[Path, list[Path]]]:
    """Yield temporary paths for an index and its shards, and rename them after the block.

    The index is renamed last, because the index makes the files a model. Before this moment, the
    older model is complete. After this moment the new model is complete, and the older shards are
    removed.

    Shards that earlier kills left are removed as well, if they existed before the block. Shards
    that appeared during the block may belong to another process, which has not yet renamed its
    index.
    """
    older = {name for name in shard_names_in(index) if name.startswith(f"{_stem(index)}-")}
    older |= _shards_of_this_library(index)
    shards = [index.with_name(name) for name in names]
    try:
        with atomic_path(index) as temporary, ExitStack() as stack:
            yield temporary, [stack.enter_context(atomic_path(shard)) for shard in shards]
    finally:
        with suppress(OSError):  # the next write removes what can't be removed now
            succeeded = shard_names_in(index).issuperset(names)
            candidates = older.union(names) if succeeded else set(names)
            for name in _without_index(candidates, index.parent):
                index.with_name(name).unlink(missing_ok=True)


def _stem(index: Path) -> str:
    return index.name.removesuffix(INDEX_ENDING)


def _shards_of_this_library(index: Path) -> set[str]:
    """Return the shards in the folder that this library wrote for this index.

    The name alone is not enough: the date in ``m-20260131-00001-of-00002.safetensors`` looks like a
    tag. The header of a shard of this library holds a provenance.
    """
    tagged = re.compile(
        rf"{re.escape(_stem(index))}-[0-9a-f]{{8}}-\d{{5,}}-of-\d{{5,}}\.safetensors"
    )
    files = [file for file in index.parent.glob("*.safetensors") if tagged.fullmatch(file.name)]
    return {file.name for file in files if _has_provenance(file)}


def _has_provenance(file: Path) -> bool:
    try:
        return PROVENANCE_KEY in read_header(file).metadata
    except CheckpointError:
        return False


def _without_index(shards: set[str], folder: Path) -> set[str]:
    """Return the shards whose names occur in no JSON file of the folder.

    An index under another name, a copy of an older index (``*.json.bak``) and an invalid index thus
    keep their shards. A temporary index that a kill left does not keep its shards.
    """
    spellings = {name: (os.fsencode(name), json.dumps(name)[1:-1].encode()) for name in shards}
    for file in folder.glob("*.json*"):
        temporary = file.name.startswith(".") and file.name.endswith(".tmp")
        text = b"" if temporary or not file.is_file() else file.read_bytes()
        shards = {
            name for name in shards if not any(spelling in text for spelling in spellings[name])
        }
    return shards
