"""The content of an index at one moment: vectors, paths and times that belong together."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from openvclip.errors import SearchError
from openvclip.search import table
from openvclip.search.shards import Vectors, map_shard, shard_name
from openvclip.search.windows import Window

__all__ = ["Block", "Snapshot", "damaged", "read_snapshot"]


class Block(NamedTuple):
    """The vectors of a shard.

    Attributes:
        first_row: the row of the first vector, counted over all blocks.
        vectors: float16 ``[n, D]``, rows of unit length.
        live: bool ``[n]``, false for the rows of removed videos; ``None`` if all rows are live.
    """

    first_row: int
    vectors: Vectors
    live: NDArray[np.bool_] | None


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The content of an index at one moment.

    The rows are numbered from 0 over all blocks.

    Attributes:
        blocks: the vectors.
        paths: the videos, in the order of the attribute ``video``.
        durations: float64 ``[videos]``, the seconds of each video.
        video: int32 ``[rows]``, the place in ``paths`` of each row; -1 for removed videos.
        start: float64 ``[rows]``, seconds.
        end: float64 ``[rows]``, seconds.
        counter: see :func:`openvclip.search.table.change_counter`.
    """

    blocks: list[Block]
    paths: list[str]
    durations: NDArray[np.float64]
    video: NDArray[np.int32]
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    counter: bytes

    @cached_property
    def count(self) -> int:
        """The number of windows."""
        return int((self.video >= 0).sum())

    def windows(self, rows: Any) -> list[Window]:
        """Return the windows of some rows.

        Raises:
            SearchError: a row does not exist, or belongs to a removed video.
        """
        chosen = np.asarray(rows, dtype=np.int64).reshape(-1)
        total = len(self.video)
        for row in chosen.tolist():
            if not 0 <= row < total or self.video[row] < 0:
                raise SearchError(f"The index has no row {row}; it has {total} rows.")
        values = zip(
            self.video[chosen].tolist(),
            self.start[chosen].tolist(),
            self.end[chosen].tolist(),
            strict=True,
        )
        return [Window(self.paths[video], start, end) for video, start, end in values]


def read_snapshot(folder: Path) -> Snapshot:
    """Return the present content of an index.

    Raises:
        SearchError: the index is damaged.
        FileNotFoundError: another process has removed a shard meanwhile.
    """
    with table.reading(folder) as connection:
        videos = connection.execute("SELECT id, path, duration FROM videos ORDER BY id").fetchall()
        shards = connection.execute("SELECT id, first, rows FROM shards ORDER BY first").fetchall()
        counter = table.change_counter(folder)  # no other process commits while this one reads
        try:
            rows = _rows(connection)
        except (TypeError, ValueError) as error:
            raise damaged(folder, f"a window is no row of numbers: {error}") from error
    _require_whole(folder, videos, shards, rows)
    identities = np.array([identity for identity, _, _ in videos], dtype=np.int64)
    return _snapshot(folder, counter, videos, shards, rows, identities)


_ROW = np.dtype([("row", "<i8"), ("video", "<i8"), ("start", "<f8"), ("end", "<f8")])


def _rows(connection: sqlite3.Connection) -> NDArray[Any]:
    (count,) = connection.execute("SELECT count(*) FROM windows").fetchone()
    rows = connection.execute("SELECT row, video, start, end FROM windows ORDER BY row")
    return np.fromiter(rows, dtype=_ROW, count=count)


def _require_whole(
    folder: Path,
    videos: list[tuple[int, str | bytes, float]],
    shards: list[tuple[int, int, int]],
    rows: NDArray[Any],
) -> None:
    """Check that each window belongs to a video and to a shard.

    Raises:
        SearchError: the table is damaged.
    """
    if not np.isin(rows["video"], [identity for identity, _, _ in videos]).all():
        raise damaged(folder, "windows belong to no video")
    inside, last = 0, 0
    for _, first, count in shards:
        if first < last:
            raise damaged(folder, "two shards hold the same rows")
        begin, last = first, first + count
        low, high = np.searchsorted(rows["row"], (begin, last))
        inside += int(high - low)
    if inside != len(rows):
        raise damaged(folder, "windows belong to no file of vectors")


def _snapshot(
    folder: Path,
    counter: bytes,
    videos: list[tuple[int, str | bytes, float]],
    shards: list[tuple[int, int, int]],
    rows: NDArray[Any],
    identities: NDArray[np.int64],
) -> Snapshot:
    total = sum(count for _, _, count in shards)
    video = np.full(total, -1, dtype=np.int32)
    times = np.zeros((2, total), dtype=np.float64)
    blocks, position = [], 0
    for number, first, count in shards:
        begin, end = np.searchsorted(rows["row"], (first, first + count))
        part = rows[begin:end]
        places = part["row"] - first + position
        video[places] = np.searchsorted(identities, part["video"])
        times[0, places], times[1, places] = part["start"], part["end"]
        live = None if len(part) == count else video[position : position + count] >= 0
        blocks.append(Block(position, map_shard(folder / shard_name(number), count), live))
        position += count
    return Snapshot(
        blocks,
        [table.path_of(path) for _, path, _ in videos],
        np.array([duration for _, _, duration in videos], dtype=np.float64),
        video,
        times[0],
        times[1],
        counter,
    )


def damaged(folder: Path, reason: str) -> SearchError:
    """Return the error of an index whose table is damaged."""
    return SearchError(
        f"{folder / table.TABLE_FILE}: is damaged ({reason}). Copy the index again, or make a new "
        "one."
    )
