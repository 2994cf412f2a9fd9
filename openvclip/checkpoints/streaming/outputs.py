"""Safetensors files that are written entry after entry and take their names when they are whole."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path

from torch import Tensor

from openvclip.checkpoints.atomic import atomic_path, write_errors
from openvclip.checkpoints.layout import (
    INDEX_ENDING,
    header_bytes,
    index_bytes,
    read_header,
    shard_names_in,
)
from openvclip.checkpoints.streaming.provenance import RECIPE
from openvclip.errors import CheckpointError
from openvclip.weights.numerics import bytes_of

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
    nothing takes it for a whole one. Only shards can be left behind whole under their own names,
    by a kill around the moment when their index takes its name; its next write removes them.

    Args:
        path: the file, or the index of a sharded model.
        sizes: the entries in the order in which they are written, on the meta device.
        metadata: texts for the headers, with a recipe, by which shards of this library are known.
            Called at the beginning, for their lengths, and at the end, when they must have the
            same lengths.
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
        names = _new_names(path, len(parts))
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


def _new_names(index: Path, count: int) -> list[str]:
    """Names of shards that no file has, so that none of an older model is written over.

    All have a tag, also where the plain names are free: it tells shards that a kill left without
    an index from those that somebody else made.
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
    """Temporary paths of an index and its shards, as ``atomic_path`` has them for one file.

    The index takes its name last. It is what makes files a model: before, the older model is
    there with all its shards, and afterwards, when these are removed, the new one.

    With the older shards go those that kills have left, if they stood there from the beginning:
    shards that came meanwhile may be of another process, which is about to name its index.
    """
    older = {name for name in shard_names_in(index) if name.startswith(f"{_stem(index)}-")}
    older |= _made_here(index)
    shards = [index.with_name(name) for name in names]
    try:
        with atomic_path(index) as temporary, ExitStack() as stack:
            yield temporary, [stack.enter_context(atomic_path(shard)) for shard in shards]
    finally:
        with suppress(OSError):  # what can't be removed now, the next write removes
            done = shard_names_in(index).issuperset(names)
            for name in _unnamed(older.union(names) if done else set(names), index.parent):
                index.with_name(name).unlink(missing_ok=True)


def _stem(index: Path) -> str:
    return index.name.removesuffix(INDEX_ENDING)


def _made_here(index: Path) -> set[str]:
    """The shards of this index's models in its folder that were written by this library.

    The name alone does not say so: in ``m-20260131-00001-of-00002.safetensors`` a date looks like
    a tag.
    """
    ours = re.compile(rf"{re.escape(_stem(index))}-[0-9a-f]{{8}}-\d{{5,}}-of-\d{{5,}}\.safetensors")
    files = [file for file in index.parent.glob("*.safetensors") if ours.fullmatch(file.name)]
    return {file.name for file in files if _has_recipe(file)}


def _has_recipe(file: Path) -> bool:
    try:
        return RECIPE in read_header(file).metadata
    except CheckpointError:
        return False


def _unnamed(shards: set[str], folder: Path) -> set[str]:
    """Those of the shards whose names are in no JSON file of the folder, whatever its form.

    So an index under another name, a copy of an older one (``*.json.bak``) and a broken one keep
    their shards. Temporary indexes, which a kill leaves beside the shards, don't.
    """
    spelled = {name: (os.fsencode(name), json.dumps(name)[1:-1].encode()) for name in shards}
    for file in folder.glob("*.json*"):
        temporary = file.name.startswith(".") and file.name.endswith(".tmp")
        text = b"" if temporary or not file.is_file() else file.read_bytes()
        shards = {name for name in shards if not any(form in text for form in spelled[name])}
    return shards
