"""Change boxes of MP4 files that FFmpeg wrote with the index at the end."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    while start + 8 <= end:
        size, kind = struct.unpack(">I4s", data[start : start + 8])
        yield kind, start, size
        start += size


def with_edits(data: bytes, edits: Sequence[tuple[int, int]]) -> bytes:
    """Replace the edit list of the first track.

    Args:
        data: a file with one track.
        edits: ``(duration in milliseconds, first time stamp in ticks)`` of each edit; the time
            stamp -1 shows nothing.
    """
    changed = bytearray(data)
    (_, movie, size), *_ = (box for box in _boxes(data, 0, len(data)) if box[0] == b"moov")
    (_, track, length), *_ = (
        box for box in _boxes(data, movie + 8, movie + size) if box[0] == b"trak"
    )
    (_, old, old_size), *_ = (
        box for box in _boxes(data, track + 8, track + length) if box[0] == b"edts"
    )
    entries = b"".join(struct.pack(">IiI", *edit, 1 << 16) for edit in edits)
    listed = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    new = struct.pack(">I4s", 8 + len(listed), b"edts") + listed
    changed[old : old + old_size] = new
    struct.pack_into(">I", changed, track, length + len(new) - old_size)
    struct.pack_into(">I", changed, movie, size + len(new) - old_size)
    return bytes(changed)


def with_matrix(data: bytes, a: float, b: float, c: float, d: float) -> bytes:
    """Replace the display matrix of the first track; (x, y) goes to (a x + c y, b x + d y)."""
    header = data.index(b"tkhd")  # the matrix of the whole movie comes before this header
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 2**30)
    matrix = struct.pack(">9i", *(int(65536 * x) for x in (a, b, 0, c, d, 0, 0, 0)), 2**30)
    return data[:header] + data[header:].replace(identity, matrix, 1)
