"""Take the frames of the windows of a clip while a stream is decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from openvclip.video._stream import Stream
from openvclip.video.sampling import Window

if TYPE_CHECKING:
    import av

__all__ = [
    "REORDER",
    "Part",
    "Picker",
    "SeekMissedError",
    "groups",
    "in_display_order",
    "parts_of",
]

# Frames of a window are sorted by time stamp, because in AVI files with B-frames the time stamps of
# the decoded frames do not increase. Codecs reorder at most 16 frames.
REORDER = 16


class SeekMissedError(Exception):
    """Raised when frames do not arrive in the order that a seek relies on."""


@dataclass(frozen=True)
class Part:
    row: int
    window: Window


def parts_of(windows: Sequence[Window], stamps: Sequence[int] | None) -> list[Part]:
    """Replace each window over the whole stream by one window for each of its frames.

    This is possible if the time stamps of the packets are known. Then frame n is the frame at
    ``stamps[n]``, which a seek can reach.
    """
    parts, row = [], 0
    for window in windows:
        if window.start is not None or not stamps:
            parts.append(Part(row, window))
        else:
            for place, offset in enumerate(window.offsets):
                stamp = stamps[min(offset, len(stamps) - 1)]
                parts.append(Part(row + place, Window(stamp, stamp, (0,))))
        row += len(window.offsets)
    return parts


@dataclass
class Picker:
    """Take the frames of one window from a stream: the same frames as ``sampling.select``.

    Attributes:
        window: the window.
        keep: function that is called with the offset and the frame when a frame is chosen; what the
            function returns is kept.
        reorder: number of frames that wait until they are sorted by time stamp. If 0, frames that
            arrive in another order are an error.
        done: whether no further frame is needed.
        ended: whether the stream ended before the window was complete.
    """

    window: Window
    keep: Callable[[int, Any], Any] = lambda offset, frame: frame
    reorder: int = REORDER
    done: bool = False
    ended: bool = False
    _count: int = 0
    _newest: int | None = None
    _waiting: dict[int, Any] = field(default_factory=dict)
    _kept: dict[int, Any] = field(default_factory=dict)
    _last: Any = None

    def feed(self, stamp: int, frame: Any) -> None:
        start, end = self.window.start, self.window.end
        if start is None:
            self._take(frame)
            return
        if stamp < start:
            return
        if not self.reorder and self._newest is not None and stamp <= self._newest:
            raise SeekMissedError
        self._newest = stamp
        self._waiting[stamp] = frame
        if end is not None and stamp > end:
            self.finish()
        elif len(self._waiting) > self.reorder:
            self._take(self._waiting.pop(min(self._waiting)))

    def finish(self) -> None:
        """Close the window: no further frame belongs to it."""
        for stamp in sorted(self._waiting):
            self._take(self._waiting[stamp])
        self._waiting.clear()
        self.done = True

    @property
    def empty(self) -> bool:
        return self._last is None

    @property
    def lacks_frames(self) -> bool:
        """Whether the stream ended before the last frame of the window."""
        return self.ended and self._count <= self.window.offsets[-1]

    def fall_back(self, frame: Any) -> None:
        """Use a frame for a window that begins after the end of the video."""
        if self.empty:
            self._last = frame

    def chosen(self) -> list[Any]:
        """Return what was kept for each offset; the last frame of the window for the others."""
        assert self._last is not None
        for offset in self.window.offsets:
            if offset not in self._kept:
                self._kept[offset] = self.keep(offset, self._last)
        return [self._kept[offset] for offset in self.window.offsets]

    def _take(self, frame: Any) -> None:
        if self.done:
            return
        if self._count in self.window.offsets:
            self._kept[self._count] = self.keep(self._count, frame)
        self._last = frame
        self.done = self._count >= self.window.offsets[-1]
        self._count += 1


def groups(pickers: Sequence[Picker], gap: int) -> list[list[Picker]]:
    """Group the windows that overlap or that are close together; a group is read in one pass."""
    grouped: list[list[Picker]] = []
    reach = 0
    for picker in sorted(pickers, key=lambda item: item.window.start or 0):
        start = picker.window.start or 0
        end = start if picker.window.end is None else max(picker.window.end, start)
        if grouped and start - reach <= gap:
            grouped[-1].append(picker)
            reach = max(reach, end)
        else:
            grouped.append([picker])
            reach = end
    return grouped


def in_display_order(stream: Stream) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yield ``(time stamp, frame)`` in display order, with increasing time stamps.

    Decoders return frames in display order. In AVI files with B-frames the time stamps of these
    frames are in another order, so the time stamps are sorted and the frames are not.
    """
    stamps: list[int] = []
    frames: deque[av.VideoFrame] = deque()
    reorder = 0 if stream.seekable else REORDER  # large frames need much memory
    for stamp, frame in stream.frames():
        heappush(stamps, stamp)
        frames.append(frame)
        if len(frames) > reorder:
            yield heappop(stamps), frames.popleft()
    while frames:
        yield heappop(stamps), frames.popleft()
