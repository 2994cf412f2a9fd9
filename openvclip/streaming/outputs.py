"""Safetensors files that are written entry after entry and take their names when they are whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path

from torch import Tensor

from openvclip.checkpoints import atomic_path, write_errors
from openvclip.streaming.inputs import bytes_of
from openvclip.tensorfiles import INDEX_ENDING, header_bytes, index_bytes, shard_names_in

SHARD_SIZE = 5_000_000_000  # bytes, as Hugging Face's libraries have it
_TO_DISK = 16 << 20  # bytes after which what is written is sent on to the disk


def in_writing_order(sizes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries with wide dtypes first, otherwise in the order given.

    So every entry begins at a multiple of its elements' size without gaps, which the format does
    not allow. The safetensors library orders entries in the same way, so that what it has written
    is read from the front to the back.
    """
    return dict(sorted(sizes.items(), key=lambda item: -item[1].itemsize))


class WeightOutput:
    """The files of one model while their entries are being written."""

    def __init__(self, path: Path, shards: list[_Shard]) -> None:
        self.path = path
        self._left = iter(shards)
        self._shard = next(self._left)

    def write(self, flat: Tensor) -> None:
        """Append elements; the entries must come in the order of the sizes, each in order too."""
        with write_errors(self.path):
            while flat.nbytes and not self._shard.bytes_left:
                self._shard = next(self._left)
            self._shard.append(bytes_of(flat))


@contextmanager
def weight_output(
    path: Path,
    sizes: Mapping[str, Tensor],
    metadata: Callable[[], Mapping[str, str]],
    max_shard_size: int | None,
) -> Iterator[WeightOutput]:
    """Files that get their names when the block is left, and are removed after an exception.

    The header of each is written last, in room that was left for it: the metadata hold hashes
    that are known only then, and a file that was given up before begins with zeros, so that
    nothing takes it for a whole one.

    Args:
        path: the file, or the index of a sharded model.
        sizes: the entries in the order in which they are written, on the meta device.
        metadata: texts for the headers. Called at the beginning, for their lengths, and at the
            end, when they must have the same lengths.
        max_shard_size: bytes of the entries of a shard; a larger entry has a shard of its own.

    Raises:
        CheckpointError: the files can't be written; what was there is left as it was.
    """
    with write_errors(path), ExitStack() as stack:
        if not path.name.endswith(INDEX_ENDING):
            temporary = stack.enter_context(atomic_path(path))
            yield WeightOutput(path, [stack.enter_context(_shard(temporary, sizes, metadata))])
            return
        parts = _parts(sizes, max_shard_size or SHARD_SIZE)
        names = _free_names(path, len(parts))
        index, files = stack.enter_context(_atomic_shards(path, names))
        yield WeightOutput(
            path,
            [
                stack.enter_context(_shard(file, part, metadata))
                for file, part in zip(files, parts, strict=True)
            ],
        )
        index.write_bytes(index_bytes(dict(zip(names, parts, strict=True)), metadata()))


class _Shard:
    def __init__(self, file: FileIO, bytes_left: int) -> None:
        self._file = file
        self.bytes_left = bytes_left
        self._given_to_disk = file.tell()

    def append(self, data: memoryview) -> None:
        self.bytes_left -= len(data)
        _write(self._file, data)
        written = self._file.tell() - self._given_to_disk
        if written >= _TO_DISK and hasattr(os, "posix_fadvise"):
            # Linux begins to write pages to the disk that it is told are not needed any more, so
            # that the flush at the end has little left to do; elsewhere it has more.
            file = self._file.fileno()
            os.posix_fadvise(file, self._given_to_disk, written, os.POSIX_FADV_DONTNEED)
            self._given_to_disk += written


@contextmanager
def _shard(
    path: Path, sizes: Mapping[str, Tensor], metadata: Callable[[], Mapping[str, str]]
) -> Iterator[_Shard]:
    with path.open("wb", buffering=0) as file:
        room = len(header_bytes(sizes, metadata()))
        file.seek(room)
        yield _Shard(file, sum(size.nbytes for size in sizes.values()))
        header = header_bytes(sizes, metadata())
        if len(header) != room:
            raise AssertionError("the metadata changed their lengths")
        file.seek(0)
        _write(file, memoryview(header))


def _write(file: FileIO, data: memoryview) -> None:
    written = 0
    while written < len(data):  # a plain write may take less than it is given
        written += file.write(data[written:])


# --- shards --------------------------------------------------------------------------------------


def _parts(sizes: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    parts: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, size in sizes.items():
        if size.nbytes > room and parts[-1]:
            parts.append({})
            room = limit
        parts[-1][name] = size
        room -= size.nbytes
    return parts


def _free_names(index: Path, count: int) -> list[str]:
    """Names of shards that no file has, so that none of an older model is written over."""
    stem, tag = index.name.removesuffix(INDEX_ENDING), ""
    while True:
        names = [f"{stem}{tag}-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]
        if not any(index.with_name(name).exists() for name in names):
            return names
        tag = f"-{secrets.token_hex(3)}"


@contextmanager
def _atomic_shards(index: Path, names: list[str]) -> Iterator[tuple[Path, list[Path]]]:
    """Temporary paths of an index and its shards, as ``atomic_path`` has them for one file.

    The index takes its name last. It is what makes files a model: before, the older model is
    there with all its shards, and afterwards, when these are removed, the new one.
    """
    older = {name for name in shard_names_in(index) if _belongs(name, index)}
    shards = [index.with_name(name) for name in names]
    try:
        with atomic_path(index) as temporary, ExitStack() as stack:
            yield temporary, [stack.enter_context(atomic_path(shard)) for shard in shards]
    finally:
        current = shard_names_in(index)
        for name in older.union(names) - current:
            index.with_name(name).unlink(missing_ok=True)


def _belongs(shard: str, index: Path) -> bool:
    return shard.startswith(f"{index.name.removesuffix(INDEX_ENDING)}-")
