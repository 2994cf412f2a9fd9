"""The extra state of modules (``torch.nn.Module.get_extra_state``) in safetensors files.

Extra state can be a tensor, bytes or any other object. A safetensors file holds tensors only, so an
object is stored as the bytes of a PyTorch file, in an entry of 8-bit integers. The metadata of the
file list these entries.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openvclip.errors import CheckpointError

EXTRA_STATE_KEY = "openvclip_extra_state"
"""The name in the metadata of a file that lists the entries which are objects. It is JSON."""


def encode(extra: Mapping[str, object]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the entries and the metadata of a safetensors file that hold the extra state.

    Args:
        extra: names to tensors and other objects.

    Raises:
        CheckpointError: an object can't be loaded again without running code.
    """
    entries: dict[str, Tensor] = {}
    objects: list[str] = []
    for name, value in extra.items():
        if isinstance(value, Tensor):
            entries[name] = value
            continue
        entries[name] = _to_bytes(name, value)
        objects.append(name)
    return entries, {EXTRA_STATE_KEY: json.dumps(objects)} if objects else {}


def decode(
    entries: Mapping[str, Tensor], metadata: Mapping[str, str], path: str
) -> tuple[dict[str, object], dict[str, str]]:
    """Return the entries of a safetensors file with the objects of :func:`encode`.

    Args:
        entries: all entries of the file. Entries on the meta device stay as they are.
        metadata: the metadata of the file.
        path: the path of the file, for errors.

    Returns:
        The entries, and the metadata without the list of objects.

    Raises:
        CheckpointError: an object is damaged, or it could run code.
    """
    decoded: dict[str, object] = dict(entries)
    if EXTRA_STATE_KEY not in metadata:
        return decoded, dict(metadata)
    for name in names_of_objects(metadata):
        value = entries.get(name)
        if value is not None and not value.is_meta:
            decoded[name] = _from_bytes(name, value, path)
    return decoded, {key: text for key, text in metadata.items() if key != EXTRA_STATE_KEY}


def load_safely(content: Any, **options: Any) -> object:
    """Call ``torch.load`` for tensors, plain values, bytes and buffers of bytes.

    Args:
        content: a path or an open file.
        options: arguments of ``torch.load``.
    """
    try:
        loaded: object = torch.load(content, weights_only=True, **options)
        return loaded
    except pickle.UnpicklingError as error:
        if not _BYTES_ARE_REFUSED.search(str(error)):
            raise
    if hasattr(content, "seek"):
        content.seek(0)
    # The list of safe classes is one for all threads, and it may hold the classes already.
    with _LOCK:
        known = torch.serialization.get_safe_globals()
        classes: list[Any] = [kind for kind in (io.BytesIO, bytes) if kind not in known]
        with torch.serialization.safe_globals(classes):
            loaded = torch.load(content, weights_only=True, **options)
    return loaded


_BYTES_ARE_REFUSED = re.compile(r"GLOBAL (\w+\.)?(BytesIO|bytes)\b")
_LOCK = threading.Lock()


def names_of_objects(metadata: Mapping[str, str]) -> list[str]:
    """Return the names of the entries that hold the bytes of objects."""
    try:
        names = json.loads(metadata.get(EXTRA_STATE_KEY, "[]"))
    except (ValueError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _to_bytes(name: str, value: object) -> Tensor:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        load_safely(io.BytesIO(buffer.getvalue()))
    except Exception as error:  # pickle raises errors of many kinds
        raise CheckpointError(
            f"{name} holds a {type(value).__name__}, which can't be loaded again without running "
            "code. Give get_extra_state a tensor, or numbers, texts and bytes in dicts and lists."
        ) from error
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def _from_bytes(name: str, value: Tensor, path: str) -> object:
    try:
        return load_safely(io.BytesIO(value.cpu().numpy().tobytes()))
    except Exception as error:  # a damaged entry raises errors of many kinds
        raise CheckpointError(
            f"{path}: the extra state {name} can't be read, because it is damaged or needs code "
            "that is not run. Save the file again."
        ) from error
