"""Parts of an index: one file for each tar shard, on a disk or in object storage.

A part is a safetensors file. Its header holds the contract of the model, the table of the videos,
and what could not be read.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvclip.checkpoints.atomic import atomic_path
from openvclip.checkpoints.contract import Contract
from openvclip.checkpoints.contract_files import CONTRACT_KEY
from openvclip.errors import MissingDependencyError, OpenVCLIPError, SearchError
from openvclip.search.identity import model_difference, window_difference
from openvclip.search.recorded import ModelSource
from openvclip.search.shards import Vectors
from openvclip.search.storage import IndexSettings
from openvclip.search.windows import WindowSettings

__all__ = ["Part", "PartFolder", "PartHeader", "PartVideo", "part_name", "require_same"]

VERSION = 1
"""The newest version of the parts that this version of openvclip reads and writes."""

_KEY = "openvclip_part"
_SUFFIX = ".safetensors"
_LENGTH = struct.Struct("<Q")  # the header of a safetensors file begins with its length
_LONGEST = 100_000_000  # bytes of a header, as safetensors allows them


@dataclass(frozen=True)
class PartVideo:
    """A video of a part.

    Attributes:
        path: the address of the video; see :class:`openvclip.video.shards.TarVideo`.
        size: number of bytes.
        windows: number of its windows.
    """

    path: str
    size: int
    windows: int


@dataclass(frozen=True)
class PartHeader:
    """What the header of a part says.

    Attributes:
        shard: the path or the URL of the shard.
        shard_size: bytes of the shard; ``None`` if its server does not tell it.
        settings: the model and the windows.
        videos: the videos whose windows are in the part, in the order of their rows.
        failed: why a video could not be read, by its address.
        damaged: why only a part of a video could be read, by its address.
        error: why the shard could not be read to its end; ``None`` if it was.
    """

    shard: str
    shard_size: int | None
    settings: IndexSettings
    videos: list[PartVideo] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    error: str | None = None

    @property
    def windows(self) -> int:
        """The number of windows."""
        return sum(video.windows for video in self.videos)


@dataclass(frozen=True, eq=False)
class Part:
    """The windows of the videos of a shard.

    Attributes:
        header: the videos, and the settings.
        vectors: float16 ``[n, D]``, rows of unit length. With no windows D is 0.
        times: start and end in seconds, float64 ``[n, 2]``.
    """

    header: PartHeader
    vectors: Vectors
    times: NDArray[np.float64]

    def split(self) -> Iterator[tuple[PartVideo, Vectors, NDArray[np.float64]]]:
        """Iterate over the videos with their vectors and times."""
        begin = 0
        for video in self.header.videos:
            rows = slice(begin, begin + video.windows)
            begin = rows.stop
            yield video, self.vectors[rows], self.times[rows]

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        from safetensors.numpy import save

        header = self.header
        about = {
            "version": VERSION,
            "shard": header.shard,
            "shard_size": header.shard_size,
            "weights_hash": header.settings.weights_hash,
            "windows": asdict(header.settings.windows),
            "source": None if header.settings.source is None else asdict(header.settings.source),
            "videos": [[video.path, video.size, video.windows] for video in header.videos],
            "failed": header.failed,
            "damaged": header.damaged,
            "error": header.error,
        }
        texts = {_KEY: json.dumps(about), CONTRACT_KEY: header.settings.contract.to_json()}
        tensors: dict[str, Any] = {"vectors": self.vectors, "times": self.times}
        return bytes(save(tensors, metadata=texts))


def part_name(shard: str) -> str:
    """Return the name of the file of a part.

    Shards of one name in different folders have parts of different names.

    Args:
        shard: the path or the URL of the shard.
    """
    stem = PurePosixPath(shard.partition("?")[0]).name.partition(".")[0]
    return f"{stem}-{sha256(os.fsencode(shard)).hexdigest()[:8]}{_SUFFIX}"


class PartFolder:
    """A folder of parts.

    Args:
        folder: a path, or a URL that fsspec opens.

    Raises:
        SearchError: the folder can't be accessed.
        MissingDependencyError: fsspec, or what fsspec needs for the URL, is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.name = os.fspath(folder)
        try:
            from fsspec.core import url_to_fs

            self._files, self._root = url_to_fs(self.name)
        except ImportError as error:
            raise MissingDependencyError(
                f"{self.name}: folders of parts are opened with fsspec ({error}): pip install "
                '"openvclip[video]", and what fsspec needs for the URL.'
            ) from error
        except Exception as error:  # the errors of a file system have any class
            raise SearchError(f"{self.name}: can't be opened with fsspec ({error}).") from error
        self._local = "file" in _protocols(self._files)

    def names(self) -> list[str]:
        """Return the names of the parts, sorted.

        Raises:
            SearchError: the folder can't be listed.
        """
        with self._errors("can't be listed"):
            self._files.invalidate_cache()
            try:
                entries = self._files.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        names = (PurePosixPath(str(entry).replace("\\", "/")).name for entry in entries)
        return sorted(n for n in names if n.endswith(_SUFFIX) and not n.startswith("."))

    def header(self, name: str) -> PartHeader | None:
        """Return the header of a part; ``None`` if there is no such part or it is not complete.

        Raises:
            SearchError: the file is no part, or has a newer version, or can't be read.
        """
        path = self._path(name)
        with self._errors(f"{name} can't be read"):
            try:
                with self._files.open(path, "rb") as file:
                    start = file.read(_LENGTH.size)
                    if len(start) < _LENGTH.size:
                        return None
                    (length,) = _LENGTH.unpack(start)
                    text = file.read(min(length, _LONGEST))
                    size = file.seek(0, os.SEEK_END)
            except FileNotFoundError:
                return None
        try:
            content = json.loads(text)
            end = max(entry["data_offsets"][1] for n, entry in content.items() if n[:2] != "__")
        except (ValueError, TypeError, KeyError, AttributeError):
            return None  # object storage of some kinds shows a file before it is complete
        if size != _LENGTH.size + length + end:
            return None
        return _header(content.get("__metadata__", {}), f"{self.name}: {name}")

    def read(self, name: str) -> Part:
        """Return a part.

        Raises:
            SearchError: the part can't be read.
        """
        from safetensors.numpy import load

        header = self.header(name)
        if header is None:
            raise SearchError(
                f"{self.name}: {name} is not complete. Remove it, and index its shard."
            )
        with self._errors(f"{name} can't be read"):
            tensors = load(self._files.cat_file(self._path(name)))
            vectors, times = tensors["vectors"], tensors["times"]
        if not (len(vectors) == len(times) == header.windows):
            raise SearchError(f"{self.name}: {name} is damaged. Remove it, and index its shard.")
        return Part(header, vectors, times)

    def write(self, part: Part) -> None:
        """Write a part. A kill leaves the old file, or a file that counts as not complete.

        Raises:
            SearchError: the part can't be written.
        """
        name, data = part_name(part.header.shard), part.to_bytes()
        with self._errors(f"{name} can't be written"):
            if self._local:
                with atomic_path(self._path(name)) as temporary:
                    temporary.write_bytes(data)
                return
            try:
                self._files.pipe_file(self._path(name), data)
            except FileNotFoundError:  # a file system with folders
                self._files.makedirs(self._root, exist_ok=True)
                self._files.pipe_file(self._path(name), data)

    def _path(self, name: str) -> str:
        return str(Path(self._root) / name) if self._local else f"{self._root}/{name}"

    @contextmanager
    def _errors(self, problem: str) -> Iterator[None]:
        try:
            yield
        except OpenVCLIPError:
            raise
        except Exception as error:  # the errors of a file system have any class
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise SearchError(
                f"{self.name}: {problem} ({reason}). Check the address, the permissions and the "
                "free space, then run the command again: finished shards are skipped."
            ) from error


def _protocols(files: Any) -> tuple[str, ...]:
    protocol = files.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _header(texts: Mapping[str, str], name: str) -> PartHeader:
    if _KEY not in texts or CONTRACT_KEY not in texts:
        raise SearchError(
            f"{name} is no part of an index; expected a folder that 'openvclip index --shards' "
            "wrote."
        )
    about = json.loads(texts[_KEY])
    if about["version"] > VERSION:
        raise SearchError(
            f"{name} has version {about['version']}; this openvclip reads version {VERSION} and "
            "older. Update openvclip: pip install -U openvclip."
        )
    source = about["source"]
    settings = IndexSettings(
        Contract.from_json(texts[CONTRACT_KEY], name),
        about["weights_hash"],
        WindowSettings(**about["windows"]),
        None if source is None else ModelSource(**source),
    )
    videos = [PartVideo(*video) for video in about["videos"]]
    rest = {key: about[key] for key in ("failed", "damaged", "error")}
    return PartHeader(about["shard"], about["shard_size"], settings, videos, **rest)


def require_same(ours: IndexSettings, other: IndexSettings, name: str, whose: str) -> None:
    """Check that a part was made with the same model and windows.

    Args:
        ours: the settings that are expected.
        other: the settings of the part.
        name: the part, for the error.
        whose: what has the settings ``ours``, for the error.

    Raises:
        SearchError: the settings differ.
    """
    difference = model_difference(ours, other)
    if difference is not None:
        setting, expected, found = difference
        reason = f"{setting} is {found} there and {expected} in {whose}"
    elif window_difference(ours.windows, other.windows) is not None:
        reason = f"the windows are {other.windows} there and {ours.windows} in {whose}"
    else:
        return
    raise SearchError(
        f"{name} was made with another model or other windows: {reason}. Use one folder of parts "
        "for each model and each length of windows."
    )
