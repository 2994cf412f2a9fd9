"""Sharded models: several files, the shards, and an index.

The shards are safetensors files or PyTorch files. The index is JSON. Its ``weight_map`` maps the
name of each entry to the file that holds the entry.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from openvclip.checkpoints.layout import LayoutError, OpenFile, json_object, open_file, read_errors
from openvclip.errors import CheckpointError, listed

INDEX_ENDING = ".safetensors.index.json"

_LONGEST_INDEX = 100_000_000  # bytes
_TOTAL_SIZE = "total_size"  # in the metadata of an index: the bytes of all weights


def open_model(path: Path, stack: ExitStack) -> tuple[list[OpenFile], dict[str, str]]:
    """Open the safetensors files that make up a model, and check their headers.

    Args:
        path: a safetensors file that holds a whole model, or the index of a sharded model.
        stack: closes the files.

    Returns:
        The open files and the metadata of the model. The metadata of a sharded model are the texts
        of its shards and of its index. If a shard and the index have a text of the same name, the
        text of the index is returned.

    Raises:
        CheckpointError: a file is missing or incomplete, or the index and the shards disagree.
    """
    with read_errors(path):
        if not is_index(path):
            opened = open_file(path, stack)
            return [opened], opened.header.metadata
        return _open_shards(path, stack)


def is_index(path: Path) -> bool:
    """Return whether the file is JSON that mentions a ``weight_map``. It may be invalid.

    Raises:
        OSError: the file can't be read.
    """
    with path.open("rb") as file:
        if file.read(64).lstrip()[:1] != b"{":
            return False
        file.seek(0)
        return b'"weight_map"' in file.read(_LONGEST_INDEX)


def shard_names_in(index: Path) -> set[str]:
    """Return the file names of the shards of an index.

    The set is empty if there is no index or if the index is invalid.
    """
    try:
        return set(_weight_map(json_object(index.read_bytes(), "the index")).values())
    except (OSError, LayoutError):
        return set()


def index_of_shard(shard: Path | str) -> Path | None:
    """Return the index beside a shard that lists the shard, or ``None``."""
    path = Path(shard)
    indexes = sorted(path.parent.glob("*.index.json"))
    return next((index for index in indexes if path.name in shard_names_in(index)), None)


def index_bytes(shards: Mapping[str, Mapping[str, Tensor]], metadata: Mapping[str, str]) -> bytes:
    """Return the index of a sharded model.

    Args:
        shards: maps the file name of each shard to the entries of the shard. Only the names and
            sizes of the entries are used.
        metadata: texts to store in the index.
    """
    total = sum(size.nbytes for sizes in shards.values() for size in sizes.values())
    weight_map = {name: shard for shard, sizes in shards.items() for name in sizes}
    index = {"metadata": {**metadata, _TOTAL_SIZE: total}, "weight_map": weight_map}
    return (json.dumps(index, indent=2) + "\n").encode()


@dataclass(frozen=True)
class Index:
    """The index of a sharded model.

    Attributes:
        path: the path of the index.
        shards: maps the path of each shard to the names that the index gives for it.
        metadata: the texts of the index.
    """

    path: Path
    shards: dict[Path, set[str]]
    metadata: dict[str, str]

    def require_listed(self, shard: Path, names: Collection[str]) -> None:
        """Check that a shard holds exactly the entries that the index gives for it.

        Args:
            shard: the path of the shard.
            names: the names of the entries in the shard.

        Raises:
            CheckpointError: the names differ.
        """
        expected, actual = self.shards[shard], set(names)
        if missing := sorted(expected - actual):
            raise _index_error(self.path, f"{shard.name} does not hold {listed(missing)}")
        if unnamed := sorted(actual - expected):
            reason = f"it does not list these entries of {shard.name}: {listed(unnamed)}"
            raise _index_error(self.path, reason)


def read_index(path: Path) -> Index:
    """Read the index of a sharded model, and check that all shards exist.

    Raises:
        CheckpointError: the index is invalid, or a shard is missing.
        OSError: the index can't be read.
    """
    try:
        index = json_object(path.read_bytes(), "the index")
        weight_map = _weight_map(index)
    except LayoutError as error:
        raise _index_error(path, str(error)) from error
    shards: dict[Path, set[str]] = {}
    for shard_name in sorted(set(weight_map.values())):
        shard = path.with_name(shard_name)
        if not shard.is_file():
            raise _index_error(path, f"there is no file {shard_name} beside it")
        shards[shard] = {name for name, holder in weight_map.items() if holder == shard_name}
    return Index(path, shards, _index_metadata(index))


def _open_shards(index_path: Path, stack: ExitStack) -> tuple[list[OpenFile], dict[str, str]]:
    index = read_index(index_path)
    shards: list[OpenFile] = []
    metadata: dict[str, str] = {}
    for path in index.shards:
        shard = open_file(path, stack)
        shards.append(shard)
        metadata.update(shard.header.metadata)
        index.require_listed(path, shard.header.sizes)
    return shards, {**metadata, **index.metadata}


def _weight_map(index: dict[str, Any]) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise LayoutError("it has no weight_map")
    for name, shard in weight_map.items():
        # Only plain file names are accepted. A path could lead anywhere on the disk.
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise LayoutError(
                f"it maps {name!r} to {str(shard)[:80]!r}; expected the name of a file beside it"
            )
    return weight_map


def _index_metadata(index: dict[str, Any]) -> dict[str, str]:
    """Return the texts among the metadata of an index, which may hold values of any kind."""
    metadata = index.get("metadata")
    if not isinstance(metadata, dict):
        return {}
    return {k: v for k, v in metadata.items() if isinstance(v, str) and k != _TOTAL_SIZE}


def _index_error(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not the index of a whole sharded model: {reason}. Copy or download the index "
        "and all shards again."
    )
