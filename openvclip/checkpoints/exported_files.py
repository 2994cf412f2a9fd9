"""Read the texts that an exported model carries, without the packages that run the model.

``model.onnx`` is a protobuf message, whose field ``metadata_props`` holds pairs of texts.
``model.pt2`` is a zip archive, whose folder ``extra`` holds a file for each text.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from openvclip.errors import CheckpointError

EXPORTED = (".onnx", ".pt2")
"""The endings of exported models."""

EXTRA_FILE = "{}.json"
"""The name in a ``.pt2`` archive of the text with this key."""

# Numbers of the fields in onnx.proto: ModelProto and StringStringEntryProto.
_METADATA, _KEY, _VALUE = 14, 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # the wire types of protobuf


def is_exported(path: str | os.PathLike[str]) -> bool:
    """Return whether the ending of a file is that of an exported model."""
    return Path(path).suffix in EXPORTED


def read_exported_texts(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the texts in an exported model by key.

    The weights are not read, and no package beside the standard library is needed.

    Args:
        path: a file that ends in ``.onnx`` or ``.pt2``.

    Raises:
        CheckpointError: the file can't be read, or is no exported model.
    """
    try:
        with open(path, "rb") as file:
            return _texts_of_pt2(file) if Path(path).suffix == ".pt2" else _texts_of_onnx(file)
    except (OSError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
        # RuntimeError: an archive with a password, or with a compression that Python lacks.
        raise CheckpointError(
            f"{os.fspath(path)}: can't be read as an exported model ({error}). Export the model "
            "again, or copy the file again."
        ) from error


def _texts_of_pt2(file: BinaryIO) -> dict[str, str]:
    with zipfile.ZipFile(file) as archive:
        # torch 2.7 names the folder extra_files, and newer versions name it extra.
        names = [n for n in archive.namelist() if Path(n).parent.name in ("extra", "extra_files")]
        return {Path(name).stem: archive.read(name).decode() for name in names}


def _texts_of_onnx(file: BinaryIO) -> dict[str, str]:
    pairs = [dict(_fields(entry)) for entry in _metadata(file)]
    return {pair.get(_KEY, b"").decode(): pair.get(_VALUE, b"").decode() for pair in pairs}


def _metadata(file: BinaryIO) -> Iterator[bytes]:
    """Yield the content of each metadata field; skip all other fields."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size == 0:
        raise ValueError("the file is empty")
    while file.tell() < size:
        tag = _varint(file)
        field, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _varint(file)
            continue
        lengths = {_FIXED64: 8, _FIXED32: 4}
        if kind != _BYTES and kind not in lengths:
            raise ValueError("the file is no ONNX model")
        length = _varint(file) if kind == _BYTES else lengths[kind]
        if file.tell() + length > size:
            raise ValueError("the file is cut off")
        if field == _METADATA and kind == _BYTES:
            yield file.read(length)
        else:
            file.seek(length, os.SEEK_CUR)


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the content of the texts of a message."""
    place = 0
    while place < len(message):
        tag = message[place]
        length, place = _varint_at(message, place + 1)
        if tag & 7 != _BYTES:
            raise ValueError("its metadata is damaged")
        yield tag >> 3, message[place : place + length]
        place += length


def _varint_at(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message):
        value |= (message[place] & 127) << shift
        shift, place = shift + 7, place + 1
        if message[place - 1] < 128:
            return value, place
    raise ValueError("the file is cut off")


def _varint(file: BinaryIO) -> int:
    value = shift = 0
    while shift < 64:
        byte = file.read(1)
        if not byte:
            raise ValueError("the file is cut off")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
        shift += 7
    raise ValueError("the file is no ONNX model")
