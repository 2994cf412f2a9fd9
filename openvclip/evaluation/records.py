"""Results on the disk as they come, so that a run that is killed goes on where it stopped.

A folder holds ``settings.json`` and, for each process of each run, a file to which that process
alone appends. A record has a checksum: what a killed process left half written is not read.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from openvclip.checkpoints.atomic import atomic_path
from openvclip.errors import RecordsError

_MAGIC = b"OVCR"
_HEAD = struct.Struct("<4sIQI")  # magic, bytes of the note, bytes of the values, CRC-32 of both
_SETTINGS = "settings.json"
_PATTERN = "run-*.records"


@dataclass(frozen=True)
class Record:
    """What was found for one piece of the work.

    Attributes:
        key: which piece.
        values: float32, any shape.
        errors: reasons by place in the piece, where something went wrong.
    """

    key: int
    values: Tensor
    errors: dict[int, str] = field(default_factory=dict)


class Records:
    """A folder of records, or the memory of this process for ``folder=None``.

    Make it in every process, then let all of them wait for each other before the first
    :meth:`add`, so that all of them have read the same.

    Args:
        folder: made where it is missing.
        settings: what the values depend on, as JSON has it.
        rank: the number of this process.

    Attributes:
        found: the records by key, those of earlier runs and those added here.

    Raises:
        RecordsError: the folder holds results of other settings, or can't be written.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], rank: int = 0) -> None:
        self.folder, self._rank = folder, rank
        self.found: dict[int, Record] = {}
        self._file: BinaryIO | None = None
        if folder is not None:
            with _write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                _claim(folder, settings)
            self.reload()
            self._run = 1 + max((_run_of(path) for path in folder.glob(_PATTERN)), default=0)

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def reload(self) -> None:
        """Read what all processes have written; of several records of a key the newest counts."""
        if self.folder is not None:
            for path in sorted(self.folder.glob(_PATTERN)):
                self.found.update((record.key, record) for record in _read(path))

    def add(self, record: Record) -> None:
        """Keep a record; it survives the end of the process, however that comes."""
        self.found[record.key] = record
        if self.folder is None:
            return
        with _write_errors(self.folder):
            if self._file is None:
                name = f"run-{self._run:06d}-{self._rank:04d}.records"
                self._file = (self.folder / name).open("xb", buffering=0)
            block = _packed(record)
            if self._file.write(block) != len(block):
                raise OSError("the disk took a part of the record only")


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings in the folder, or check that they are those noted there."""
    path = folder / _SETTINGS
    given = json.loads(json.dumps(settings))  # as JSON has them: no tuples
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(given, indent=1) + "\n", encoding="utf-8")
        return
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordsError(f"{path} is not JSON ({error}); give another folder.") from error
    if noted != given:
        names = [*given, *(name for name in noted if name not in given)]
        lines = [
            f"  {name}: there {json.dumps(noted.get(name))}, now {json.dumps(given.get(name))}"
            for name in names
            if noted.get(name) != given.get(name)
        ]
        raise RecordsError(
            f"{folder} holds results of other settings:\n" + "\n".join(lines) + "\n"
            "Give another folder, or remove this one to begin again."
        )


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Turns the system's errors into :class:`RecordsError`."""
    try:
        yield
    except OSError as error:
        raise RecordsError(
            f"Results can't be kept in {folder}: {error}. Check free space and permissions; the "
            "same command goes on from what is there."
        ) from error


def _run_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _packed(record: Record) -> bytes:
    values = record.values.detach().to("cpu", torch.float32).contiguous().numpy()
    note = {"key": record.key, "shape": list(values.shape), "errors": record.errors}
    head = json.dumps(note).encode()
    body = values.astype("<f4", copy=False).tobytes()
    return (
        _HEAD.pack(_MAGIC, len(head), len(body), zlib.crc32(body, zlib.crc32(head))) + head + body
    )


def _read(path: Path) -> Iterator[Record]:
    """The whole records of a file; what follows the first that is not whole is left."""
    with path.open("rb") as file:
        while len(start := file.read(_HEAD.size)) == _HEAD.size:
            magic, head_size, body_size, checksum = _HEAD.unpack(start)
            if magic != _MAGIC or body_size > path.stat().st_size:
                return
            head, body = file.read(head_size), file.read(body_size)
            whole = (len(head), len(body)) == (head_size, body_size)
            if not whole or zlib.crc32(body, zlib.crc32(head)) != checksum:
                return
            note = json.loads(head)
            values = np.frombuffer(body, "<f4").astype(np.float32).reshape(note["shape"])
            errors = {int(place): reason for place, reason in note["errors"].items()}
            yield Record(note["key"], torch.from_numpy(values), errors)
