"""Changes of an index: new videos, removed videos, and shards that are written again."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from openvclip.errors import SearchError
from openvclip.search import table
from openvclip.search.shards import Vectors, map_shard, shard_name, shard_number, write_shard

__all__ = ["FileState", "NewVideo", "Piece", "Writer"]

PIECE = 8192
"""Windows of a video or of several short videos after which a shard is written."""
_SMALL = 16_384  # rows of a shard that is joined with others
_LARGEST = 262_144  # rows of a shard that was joined
_MANY = 16  # small shards that are joined in the middle of a long run
_FEW = 8  # small shards that are joined at its end
_DEAD = 0.2  # share of dead rows from which a shard is written again


class FileState(NamedTuple):
    """What tells whether a file changed.

    Attributes:
        size: bytes; ``None`` if it is not known.
        mtime: time of the last change in nanoseconds; ``None`` if it is not known.
    """

    size: int | None
    mtime: int | None


class Piece(NamedTuple):
    """A shard that no commit names yet.

    Attributes:
        number: the number of the shard.
        rows: number of vectors.
        width: length of a vector.
    """

    number: int
    rows: int
    width: int


@dataclass
class NewVideo:
    """A video whose windows are encoded.

    Attributes:
        path: the video.
        state: the state of the file before it was decoded.
        pieces: shards with the first windows of a long video.
        vectors: the vectors of the other windows.
        times: start and end of all windows in seconds, float64 ``[n, 2]``.
    """

    path: str
    state: FileState
    pieces: list[Piece] = field(default_factory=list)
    vectors: list[Vectors] = field(default_factory=list)
    times: list[NDArray[np.float64]] = field(default_factory=list)

    @property
    def waiting(self) -> int:
        """The number of windows that are in no shard yet."""
        return sum(map(len, self.vectors))


class Writer:
    """Changes an index. :meth:`Storage.writing` makes it.

    Args:
        folder: the folder of the index.
        connection: a connection to its table.
    """

    def __init__(self, folder: Path, connection: sqlite3.Connection) -> None:
        self._folder = folder
        self._connection = connection
        self._next = self._last_number() + 1
        self._remove_orphans()

    def known(self) -> dict[str, FileState]:
        """Return the videos of the index and the states of their files."""
        rows = self._connection.execute("SELECT path, size, mtime FROM videos ORDER BY id")
        return {table.path_of(path): FileState(size, mtime) for path, size, mtime in rows}

    def write_piece(self, vectors: Sequence[Vectors]) -> Piece:
        """Write a shard, which the next commit can name.

        Raises:
            SearchError: the shard can't be written.
        """
        rows, width = sum(map(len, vectors)), vectors[0].shape[1]
        return self._write(vectors, rows, width)

    def discard(self, pieces: Iterable[Piece]) -> None:
        """Remove shards that no commit will name."""
        self._unlink(piece.number for piece in pieces)

    def commit(self, added: Sequence[NewVideo] = (), removed: Iterable[str] = ()) -> None:
        """Change the index in one transaction: remove videos, then add videos.

        A video of ``added`` replaces the video with the same path.

        Raises:
            SearchError: the index can't be written. It has its old content.
        """
        tails = [vectors for video in added for vectors in video.vectors]
        shared = self.write_piece(tails) if tails else None
        gone = [*removed, *(video.path for video in added)]
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        with connection:
            self._delete(gone)
            first = self._next_row()
            places = {}
            for piece in [*(piece for video in added for piece in video.pieces), shared]:
                if piece is not None:
                    places[piece.number] = first
                    first = self._name(piece, first)
            tail = 0 if shared is None else places[shared.number]
            for video in added:
                rows = [range(places[p.number], places[p.number] + p.rows) for p in video.pieces]
                rows.append(range(tail, tail + video.waiting))
                tail += video.waiting
                self._insert(video, np.concatenate([np.arange(r.start, r.stop) for r in rows]))

    def compact(self, *, last: bool = False, whole: bool = False) -> None:
        """Join small shards, and write shards with many dead rows again.

        Args:
            last: whether the run ends. In the middle of a run, only many small shards are joined.
            whole: whether to do so with few small shards and few dead rows too.

        Raises:
            SearchError: the index can't be written. It has its old content.
        """
        chosen: list[tuple[int, int, int]] = []  # number, rows, live rows
        small = []
        for number, rows, live in self._shards():
            if rows > live and (whole or (last and rows - live > _DEAD * rows)):
                chosen.append((number, rows, live))
            elif rows < _SMALL:
                small.append((number, rows, live))
        enough = 2 if whole or (chosen and last) else _FEW if last else _MANY
        if len(small) >= enough:
            chosen = sorted([*chosen, *small])
        for group in _groups(chosen):
            self._rewrite([number for number, _, _ in group])

    # --- shards --------------------------------------------------------------------------------

    def _write(self, parts: Iterable[Vectors], rows: int, width: int) -> Piece:
        path = self._folder / shard_name(self._next)
        try:
            write_shard(path, parts, rows, width)
        except OSError as error:
            raise SearchError(
                f"{path}: can't be written ({error.strerror}). The index has the videos of the "
                "last commit. Check the free space, then run the command again: videos that are "
                "indexed already are skipped."
            ) from error
        self._next += 1
        return Piece(self._next - 1, rows, width)

    def _rewrite(self, numbers: Sequence[int]) -> None:
        """Write the live rows of some shards as one shard, and remove these shards."""
        connection = self._connection
        marks = ",".join("?" * len(numbers))
        shards = connection.execute(
            f"SELECT id, first, rows, width FROM shards WHERE id IN ({marks}) ORDER BY first",
            numbers,
        ).fetchall()
        live = [self._live(first, rows) for _, first, rows, _ in shards]
        total = sum(map(len, live))

        def parts() -> Iterator[Vectors]:
            for (number, first, rows, _), chosen in zip(shards, live, strict=True):
                vectors = map_shard(self._folder / shard_name(number), rows)
                for begin in range(0, len(chosen), PIECE):
                    yield vectors[chosen[begin : begin + PIECE] - first]

        piece = self._write(parts(), total, shards[0][3]) if total else None
        connection.execute("BEGIN IMMEDIATE")
        with connection:
            if piece is not None:
                start = self._next_row()
                self._name(piece, start)
                rows = np.concatenate(live).tolist()
                connection.executemany(
                    "UPDATE windows SET row = ? WHERE row = ?",
                    zip(range(start, start + total), rows, strict=True),
                )
            connection.execute(f"DELETE FROM shards WHERE id IN ({marks})", numbers)
        self._unlink(numbers)

    def _remove_orphans(self) -> None:
        """Remove the files that a kill left: shards that no commit names, and unfinished files."""
        named = {number for (number,) in self._connection.execute("SELECT id FROM shards")}
        with suppress(OSError):
            names = [entry.name for entry in self._folder.iterdir()]
            numbers = {shard_number(name) for name in names} - {None} - named
            self._unlink(number for number in numbers if number is not None)
            for name in names:
                if name.startswith(".vectors-") and name.endswith(".tmp"):
                    (self._folder / name).unlink()

    def _unlink(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            with suppress(OSError):  # Windows keeps a file that a reader uses; it is removed later
                (self._folder / shard_name(number)).unlink()

    # --- rows ----------------------------------------------------------------------------------

    def _last_number(self) -> int:
        found = self._connection.execute(
            "SELECT seq FROM sqlite_sequence WHERE name = 'shards'"
        ).fetchone()
        return 0 if found is None else int(found[0])

    def _next_row(self) -> int:
        (row,) = self._connection.execute("SELECT max(first + rows) FROM shards").fetchone()
        return row or 0

    def _name(self, piece: Piece, first: int) -> int:
        """Enter a shard into the table, and return the row after its last row."""
        self._connection.execute(
            "INSERT INTO shards (id, first, rows, width) VALUES (?, ?, ?, ?)",
            (piece.number, first, piece.rows, piece.width),
        )
        return first + piece.rows

    def _insert(self, video: NewVideo, rows: NDArray[np.int64]) -> None:
        times = np.concatenate(video.times)
        found = self._connection.execute(
            "INSERT INTO videos (path, size, mtime, duration, windows) VALUES (?, ?, ?, ?, ?)",
            (table.stored_path(video.path), *video.state, float(times[:, 1].max()), len(rows)),
        )
        identity = found.lastrowid
        self._connection.executemany(
            "INSERT INTO windows (row, video, start, end) VALUES (?, ?, ?, ?)",
            (
                (row, identity, start, end)
                for row, (start, end) in zip(rows.tolist(), times.tolist(), strict=True)
            ),
        )

    def _delete(self, paths: Iterable[str]) -> None:
        connection = self._connection
        connection.execute("CREATE TEMP TABLE IF NOT EXISTS gone (id INTEGER PRIMARY KEY)")
        connection.execute("DELETE FROM gone")
        connection.executemany(
            "INSERT OR IGNORE INTO gone SELECT id FROM videos WHERE path = ?",
            ((table.stored_path(path),) for path in paths),
        )
        if connection.execute("SELECT 1 FROM gone").fetchone():
            connection.execute("DELETE FROM windows WHERE video IN (SELECT id FROM gone)")
            connection.execute("DELETE FROM videos WHERE id IN (SELECT id FROM gone)")

    def _shards(self) -> list[tuple[int, int, int]]:
        """Return the number, the rows and the live rows of each shard."""
        shards = self._connection.execute("SELECT id, first, rows FROM shards ORDER BY first")
        return [
            (number, rows, self._count(first, rows)) for number, first, rows in shards.fetchall()
        ]

    def _count(self, first: int, rows: int) -> int:
        query = "SELECT count(*) FROM windows WHERE row >= ? AND row < ?"
        (count,) = self._connection.execute(query, (first, first + rows)).fetchone()
        return int(count)

    def _live(self, first: int, rows: int) -> NDArray[np.int64]:
        query = "SELECT row FROM windows WHERE row >= ? AND row < ? ORDER BY row"
        found = self._connection.execute(query, (first, first + rows))
        return np.fromiter((row for (row,) in found), dtype=np.int64)


def _groups(shards: Sequence[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Yield neighbouring shards that become one shard each."""
    group: list[tuple[int, int, int]] = []
    for shard in shards:
        if group and sum(live for _, _, live in group) + shard[2] > _LARGEST:
            yield group
            group = []
        group.append(shard)
    if group:
        yield group
