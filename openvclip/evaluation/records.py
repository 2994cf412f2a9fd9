"""Results that are saved while they are computed, so that a stopped run can be continued.

A folder holds ``settings.json`` and one file for each process of each run. A process appends to
its own file only. Each record has a checksum: a record that a killed process wrote in part is
ignored.
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
_HEADER = struct.Struct("<4sIQI")  # magic, bytes of the note, bytes of the values, CRC-32 of both
_SETTINGS = "settings.json"
_PATTERN = "run-*.records"


@dataclass(frozen=True)
class Record:
    """The result of one piece of the work, such as a batch.

    Attributes:
        key: the number of the piece.
        values: float32 tensor of any shape.
        errors: the reason of each failure, by the index of the failed item in the piece.
    """

    key: int
    values: Tensor
    errors: dict[int, str] = field(default_factory=dict)


class Records:
    """The records of a run, in a folder or in memory.

    Create ``Records`` in every process. Then let the processes wait for each other before the first
    :meth:`add`, so that all processes have read the same records.

    Args:
        folder: the folder of the records. Missing folders are created. ``None`` keeps the records
            in memory.
        settings: everything that the values depend on, as JSON objects.
        rank: the rank of this process.

    Attributes:
        by_key: the records of earlier runs and the records added here, by key.

    Raises:
        RecordsError: the folder holds records of other settings, or can't be written.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any], rank: int = 0) -> None:
        self.folder, self._rank = folder, rank
        self.by_key: dict[int, Record] = {}
        self._file: BinaryIO | None = None
        if folder is not None:
            with _write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                _require_settings(folder, settings)
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
        """Read the records of all processes. For each key, the newest record counts."""
        if self.folder is not None:
            for path in sorted(self.folder.glob(_PATTERN)):
                self.by_key.update((record.key, record) for record in _read(path))

    def add(self, record: Record) -> None:
        """Add a record. The record is in the file when this method returns.

        Raises:
            RecordsError: the record can't be written.
        """
        self.by_key[record.key] = record
        if self.folder is None:
            return
        with _write_errors(self.folder):
            if self._file is None:
                name = f"run-{self._run:06d}-{self._rank:04d}.records"
                self._file = (self.folder / name).open("xb", buffering=0)
            block = _packed(record)
            if self._file.write(block) != len(block):
                raise OSError("only a part of the record was written")


def _require_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a new folder, or compare them with the settings of an earlier run."""
    path = folder / _SETTINGS
    requested = json.loads(json.dumps(settings))  # JSON turns tuples into lists
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(requested, indent=1) + "\n", encoding="utf-8")
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordsError(f"{path} is not JSON ({error}); give another folder.") from error
    if stored != requested:
        names = [*requested, *(name for name in stored if name not in requested)]
        lines = [
            f"  {name}: stored {json.dumps(stored.get(name))}, "
            f"requested {json.dumps(requested.get(name))}"
            for name in names
            if stored.get(name) != requested.get(name)
        ]
        raise RecordsError(
            f"{folder} holds results of other settings:\n" + "\n".join(lines) + "\n"
            "Give another folder, or remove this folder to start again."
        )


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    """Raise :class:`RecordsError` in place of errors of the operating system."""
    try:
        yield
    except OSError as error:
        raise RecordsError(
            f"Results can't be written to {folder}: {error}. Check the free space and the "
            "permissions, then start again: the run continues with the results already saved."
        ) from error


def _run_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _packed(record: Record) -> bytes:
    values = record.values.detach().to("cpu", torch.float32).contiguous().numpy()
    description = {"key": record.key, "shape": list(values.shape), "errors": record.errors}
    note = json.dumps(description).encode()
    body = values.astype("<f4", copy=False).tobytes()
    checksum = zlib.crc32(body, zlib.crc32(note))
    return _HEADER.pack(_MAGIC, len(note), len(body), checksum) + note + body


def _read(path: Path) -> Iterator[Record]:
    """Yield the records of a file up to the first record that is incomplete or damaged."""
    with path.open("rb") as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            magic, note_size, body_size, checksum = _HEADER.unpack(header)
            if magic != _MAGIC or body_size > path.stat().st_size:
                return
            note, body = file.read(note_size), file.read(body_size)
            complete = (len(note), len(body)) == (note_size, body_size)
            if not complete or zlib.crc32(body, zlib.crc32(note)) != checksum:
                return
            description = json.loads(note)
            values = np.frombuffer(body, "<f4").astype(np.float32).reshape(description["shape"])
            errors = {int(index): reason for index, reason in description["errors"].items()}
            yield Record(description["key"], torch.from_numpy(values), errors)
