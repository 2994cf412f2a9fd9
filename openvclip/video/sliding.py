"""Windows that slide over a long video, in one pass and in memory that does not grow with it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from openvclip.errors import VideoError, VideoOptionError
from openvclip.video._stream import Stream, check_path, require_av
from openvclip.video.decoding import REORDER, frames_to_tensor

if TYPE_CHECKING:
    import os

    import av

__all__ = ["SlidingWindow", "sliding_windows"]

_ROUNDING = 1e-3  # seconds; Matroska keeps times in milliseconds
_LONGEST = 600.0  # seconds for which one frame can be shown


class SlidingWindow(NamedTuple):
    """A part of a video.

    Attributes:
        start: seconds from the first frame of the video.
        end: seconds; that of the last window is the end of the video where it comes first.
        clip: ``[T, ...]``: what the transform gave for the window's frames.
    """

    start: float
    end: float
    clip: Tensor


@dataclass
class _Waiting:
    """A window that is not over yet, and the times of the frames that it still wants."""

    start: float
    wanted: deque[float]
    frames: list[Tensor] = field(default_factory=list)


def sliding_windows(
    path: str | os.PathLike[str],
    *,
    transform: Callable[[Tensor], Tensor],
    num_frames: int = 8,
    seconds: float = 128 / 30,
    step: float | None = None,
) -> Iterator[SlidingWindow]:
    """Windows of equal length over a video, from its beginning to its end.

    A window's frames are those shown at ``T`` equally spaced times from its start on; its last
    ones repeat where the video ends before the window does. No window begins at or behind the
    end of the video, nor after one that has reached it.

    Args:
        path: a video file.
        transform: called once on each frame that is taken, uint8 ``[1, C, H, W]``.
        num_frames: T, frames of a window.
        seconds: length of a window. The default is that of the papers' clips: 8 frames at 30
            frames per second, 16 apart.
        step: from the start of one window to that of the next, seconds; half a window by default.

    Raises:
        VideoError, VideoNotFoundError: the file can't be read, or holds no frames.
        VideoOptionError: a number out of range.
        MissingDependencyError: PyAV is not installed.
    """
    step = seconds / 2 if step is None else step
    for name, value in (("seconds", seconds), ("step", step)):
        if not (math.isfinite(value) and value > 0):
            raise VideoOptionError(f"{name}={value!r}: expected a number of seconds above 0.")
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise VideoOptionError(f"num_frames={num_frames!r}: expected a whole number, at least 1.")
    require_av()
    full = check_path(path)
    return _windows(full, transform, num_frames, seconds, step)


def _windows(
    path: str, transform: Callable[[Tensor], Tensor], count: int, seconds: float, step: float
) -> Iterator[SlidingWindow]:
    waiting: deque[_Waiting] = deque()
    made, reached, until = 0, 0.0, 0.0
    frame: av.VideoFrame | None = None
    pixels: Tensor | None = None
    for until, frame in _shown(path):
        while made == 0 or made * step + _ROUNDING < until:
            start = made * step
            times = deque(start + i * seconds / count for i in range(count))
            waiting.append(_Waiting(start, times))
            made += 1
        pixels = None
        for window in waiting:
            while window.wanted and window.wanted[0] + _ROUNDING < until:
                if pixels is None:
                    pixels = transform(frames_to_tensor([frame]))[0]
                window.wanted.popleft()
                window.frames.append(pixels)
        while waiting and not waiting[0].wanted and waiting[0].start + seconds <= until:
            window = waiting.popleft()
            reached = window.start + seconds
            yield SlidingWindow(window.start, reached, torch.stack(window.frames))
    if frame is None:
        raise VideoError(f"{path}: decoded 0 frames; the file is truncated, damaged or no video.")
    while waiting and (reached == 0 or reached + _ROUNDING < until):
        window = waiting.popleft()
        reached = min(window.start + seconds, until)
        for _ in window.wanted:
            if pixels is None:
                pixels = transform(frames_to_tensor([frame]))[0]
            window.frames.append(pixels)
        yield SlidingWindow(window.start, reached, torch.stack(window.frames))


def _shown(path: str) -> Iterator[tuple[float, av.VideoFrame]]:
    """The frames in the order in which they are shown, each with the time at which it goes."""
    with Stream(path) as stream:
        before: av.VideoFrame | None = None
        origin = shown = 0.0
        for stamp, frame in _in_order(stream):
            if before is None:
                origin = stream.seconds_at(stamp)
            else:
                # Time stamps of damaged files jump, also back.
                shown = min(max(stream.seconds_at(stamp) - origin, shown), shown + _LONGEST)
                yield shown, before
            before = frame
        if before is not None:
            yield shown + 1 / stream.info.fps, before


def _in_order(stream: Stream) -> Iterator[tuple[int, av.VideoFrame]]:
    """The frames as they are shown, with time stamps that rise.

    Decoders give frames in that order. In AVI files with B-frames it is the time stamps that run
    back: each belongs to the place of its rank.
    """
    stamps: list[int] = []
    frames: deque[av.VideoFrame] = deque()
    for stamp, frame in stream.frames():
        heappush(stamps, stamp)
        frames.append(frame)
        if len(frames) > REORDER:
            yield heappop(stamps), frames.popleft()
    while frames:
        yield heappop(stamps), frames.popleft()
