"""How many frames a stream has: what the container says, and what the packets say.

The frames of a video are the frames that a player shows. A container can count more frames (an edit
list hides some of them), fewer (the header of a fragmented MP4 counts the first fragment alone) or
none (a live recording). The number is then taken from the packets, without decoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from openvclip.video._containers import Container
from openvclip.video.sampling import StreamInfo

__all__ = [
    "PacketIndex",
    "count_packets",
    "frame_rate",
    "header_is_right",
    "header_rate",
    "measured",
    "with_count",
]

_DEFAULT_FPS = 30.0
# FFmpeg gives 90,000 frames per second for a single picture, and 1000 if all it knows is that the
# times are in milliseconds.
_HIGHEST_FPS = 1000.0
# A rate that FFmpeg estimates from the first frames is replaced if it is this far from the rate of
# the whole file.
_RATE_TOLERANCE = 0.1
_ENTRIES = 4096  # entries of an index that are in memory at a time
# Many encoders hide one frame before the beginning. The released code counts such a frame.
_HIDDEN = 1


@dataclass(frozen=True)
class PacketIndex:
    """The result of a pass over the packets of a stream, without decoding.

    Attributes:
        count: number of packets that contain a frame that is shown.
        stamps: presentation times of these packets in ticks, in increasing order. ``None`` if a
            packet has no presentation time or if two packets have the same presentation time.
        start: the first time stamp, or ``None`` if the packets have no time stamps.
        end: the time at which the last frame disappears, or ``None``.
    """

    count: int
    stamps: tuple[int, ...] | None
    start: int | None = None
    end: int | None = None


def count_packets(packets: Iterable[Any]) -> PacketIndex:
    """Count the frames that are shown by their packets."""
    stamps: list[int | None] = []
    times: list[int] = []
    ends: list[int] = []
    for packet in packets:
        if not packet.size or packet.is_discard:
            continue
        stamp = packet.pts
        stamps.append(stamp)
        time = packet.dts if stamp is None else stamp
        if time is not None:
            times.append(time)
            ends.append(time + (packet.duration or 0))
    known = sorted(stamp for stamp in stamps if stamp is not None)
    complete = len(known) == len(stamps) and len(set(known)) == len(known)
    if not times:
        return PacketIndex(len(stamps), tuple(known) if complete else None)
    start, last = min(times), max(times)
    step = round((last - start) / (len(times) - 1)) if len(times) > 1 else 1
    # The last packet often has no duration.
    end = max(ends) if max(ends) > last else last + max(step, 1)
    return PacketIndex(len(stamps), tuple(known) if complete else None, start, end)


def header_is_right(stream: Any, container: Container, info: StreamInfo) -> bool:
    """Return whether the container counts the frames that are shown.

    Args:
        stream: the stream of PyAV.
        container: the treatment of the format of the file.
        info: the metadata that the container gives, with a number of frames.
    """
    if container.counts != "index":
        return container.counts == "header"
    entries, frames = stream.index_entries, info.frames or 0
    if len(entries) != frames:
        return False
    # Slices, because a loop over the entries takes longer. A film has 100,000 entries, which need
    # memory as objects of Python.
    shown = sum(
        1
        for begin in range(0, len(entries), _ENTRIES)
        for entry in entries[begin : begin + _ENTRIES]
        if entry.size and not entry.is_discard
    )
    # The index of a fragmented file can have the first fragment alone.
    seconds = (info.duration or 0) * (stream.time_base or 0)
    expected = float(seconds) * info.fps
    return shown >= frames - _HIDDEN and abs(expected - frames) <= max(2.0, 0.1 * frames)


def measured(info: StreamInfo, index: PacketIndex, base: Fraction | None) -> StreamInfo:
    """Return metadata with the number of frames, the duration and the rate of the packets."""
    if index.start is None or index.end is None or not base or not index.count:
        return with_count(info, index.count)
    duration = index.end - index.start
    rate = float(index.count / (duration * base))
    fps = rate if rate <= _HIGHEST_FPS else info.fps
    return StreamInfo(fps=fps, frames=index.count, duration=duration, start=index.start)


def with_count(info: StreamInfo, count: int) -> StreamInfo:
    """Return the metadata with a number of frames that was counted from the packets."""
    return replace(info, frames=count, counted=True)


def frame_rate(fps: float, count: int, length: int, base: Fraction | None) -> float:
    """Return the rate of a whole file if it is far from ``fps``, and ``fps`` otherwise.

    Args:
        fps: the rate that FFmpeg gives, in frames per second.
        count: number of frames.
        length: time from the first to the last frame, in ticks.
        base: length of a tick in seconds.
    """
    if count < 2 or length <= 0 or not base:
        return fps
    rate = float((count - 1) / (length * base))
    far = abs(rate / fps - 1) > _RATE_TOLERANCE
    return rate if far and rate <= _HIGHEST_FPS else fps


def header_rate(stream: Any) -> float:
    """Return the frame rate that FFmpeg gives for a stream, in frames per second."""
    average, guesses = stream.average_rate, (stream.guessed_rate, stream.base_rate)
    if average and 0 < average <= _HIGHEST_FPS:
        return float(average)
    for rate in guesses:
        if rate and 0 < rate < _HIGHEST_FPS and math.isfinite(float(rate)):
            return float(rate)
    return _DEFAULT_FPS
