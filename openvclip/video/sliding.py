"""Sliding windows over a long video, in one pass and with constant memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from openvclip.errors import VideoOptionError
from openvclip.video._inputs import EncodedVideo
from openvclip.video._numbered import NumberedVideo
from openvclip.video._pictures import Pictures
from openvclip.video._stream import Stream, nothing_decoded
from openvclip.video._windows import in_display_order
from openvclip.video.sources import VideoSource, opened

if TYPE_CHECKING:
    import av

__all__ = ["SlidingWindow", "sliding_windows"]

_ROUNDING = 1e-3  # seconds; Matroska keeps times in milliseconds
_WHOLE = 0.9  # share of the stated length; players hide some frames at both ends
_MOST_AT_ONCE = 100_000  # windows that begin while one frame is displayed: all are in memory
_LONGEST = 600.0  # seconds; the longest time for which one frame is displayed


class SlidingWindow(NamedTuple):
    """A window of a video.

    Attributes:
        start: start of the window, in seconds from the first frame of the video.
        end: end of the window in seconds, at most the end of the video.
        clip: the transformed frames of the window, ``[T, ...]``.
    """

    start: float
    end: float
    clip: Tensor


@dataclass
class _Waiting:
    """A window that is not complete, and the times of the frames that it still needs."""

    start: float
    wanted: deque[float]
    frames: list[Tensor] = field(default_factory=list)


def sliding_windows(
    path: VideoSource,
    *,
    transform: Callable[[Tensor], Tensor],
    num_frames: int = 8,
    seconds: float = 128 / 30,
    step: float | None = None,
    fps: float | None = None,
    alone: bool = True,
    damaged: Callable[[str], object] | None = None,
) -> Iterator[SlidingWindow]:
    """Iterate over windows of equal length, from the beginning to the end of a video.

    The frames of a window are the frames displayed at T equally spaced times, the first of which is
    the start of the window. If a window extends beyond the end of the video, the last frame of the
    video is used for the times after the end. All windows begin before the end of the video. The
    first window that reaches the end of the video is the last window.

    Args:
        path: a video file, or another :data:`~openvclip.video.VideoSource`.
        transform: function that is called once on each frame of a window, uint8 ``[1, C, H, W]``.
        num_frames: T, the number of frames in a window.
        seconds: length of a window. Default: the length of the clips in the papers, 8 frames with a
            distance of 16 frames at 30 frames per second.
        step: time from the start of a window to the start of the next window, in seconds. Default:
            half of ``seconds``.
        fps: frames per second, if ``path`` is an array of frames.
        alone: whether this thread is the only one that decodes videos. If not, the decoder uses one
            thread.
        damaged: function that is called at the end of a file of which only a part could be
            decoded, with the reason. Default: nothing is called.

    Yields:
        A :class:`SlidingWindow` for each window.

    Raises:
        VideoError, VideoNotFoundError: the file cannot be read, or no frame can be decoded.
        VideoOptionError: a number is out of range, or the frame rate of an array is not given.
        UsageError, VideoShapeError: ``path`` is of an unknown kind, or its frames have a wrong
            shape or dtype.
        MissingDependencyError: PyAV is not installed.
    """
    _require_seconds("seconds", seconds)
    step = seconds / 2 if step is None else step
    _require_seconds("step", step)
    if isinstance(num_frames, bool) or not isinstance(num_frames, int) or num_frames < 1:
        raise VideoOptionError(f"num_frames={num_frames!r}: expected a whole number, at least 1.")
    with ExitStack() as stack:
        source = stack.enter_context(opened(path, fps, alone=alone))
        if isinstance(source, NumberedVideo):
            source.require_rate("a timeline")
        cut = _Cut(transform, num_frames, seconds, step, damaged)
        return _windows_of(source, cut, stack.pop_all())


def _require_seconds(name: str, value: object) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type, operator]
        raise VideoOptionError(f"{name}={value!r}: expected a number of seconds above 0.")


@dataclass(frozen=True)
class _Cut:
    """How a video is cut into windows: the arguments of :func:`sliding_windows`."""

    transform: Callable[[Tensor], Tensor]
    count: int
    seconds: float
    step: float
    damaged: Callable[[str], object] | None


def _windows_of(
    source: EncodedVideo | NumberedVideo, cut: _Cut, stack: ExitStack
) -> Iterator[SlidingWindow]:
    with stack:
        if isinstance(source, NumberedVideo):
            shown = source.displayed()
        else:
            shown = _displayed(source, cut.damaged)
        yield from _windows(source.name, shown, cut)


def _windows(
    name: str, shown: Iterator[tuple[float, Callable[[], Tensor]]], cut: _Cut
) -> Iterator[SlidingWindow]:
    transform, count, seconds, step = cut.transform, cut.count, cut.seconds, cut.step
    waiting: deque[_Waiting] = deque()
    begun, reached, until = 0, 0.0, 0.0
    frame: Callable[[], Tensor] | None = None
    pixels: Tensor | None = None
    for until, frame in shown:
        if (until - begun * step) / step > _MOST_AT_ONCE:
            raise VideoOptionError(
                f"{name}: one frame is displayed until {until:g} seconds, so more than "
                f"{_MOST_AT_ONCE} windows begin in it with step={step:g}. Give a larger step."
            )
        while begun == 0 or begun * step + _ROUNDING < until:
            start = begun * step
            times = deque(start + i * seconds / count for i in range(count))
            waiting.append(_Waiting(start, times))
            begun += 1
        pixels = None
        for window in waiting:
            while window.wanted and window.wanted[0] + _ROUNDING < until:
                if pixels is None:
                    pixels = transform(frame())[0]
                window.wanted.popleft()
                window.frames.append(pixels)
        while waiting and not waiting[0].wanted and waiting[0].start + seconds <= until:
            window = waiting.popleft()
            reached = window.start + seconds
            yield SlidingWindow(window.start, reached, torch.stack(window.frames))
    if frame is None:
        raise nothing_decoded(name)
    while waiting and (reached == 0 or reached + _ROUNDING < until):
        window = waiting.popleft()
        reached = min(window.start + seconds, until)
        for _ in window.wanted:
            if pixels is None:
                pixels = transform(frame())[0]
            window.frames.append(pixels)
        yield SlidingWindow(window.start, reached, torch.stack(window.frames))


def _displayed(
    video: EncodedVideo, damaged: Callable[[str], object] | None
) -> Iterator[tuple[float, Callable[[], Tensor]]]:
    """Yield ``(time at which the frame disappears, frame)`` in display order.

    The frame is a function that returns the pixels, uint8 ``[1, C, H, W]``.
    """
    pictures = Pictures(video.name)
    with Stream(video) as stream:
        before: av.VideoFrame | None = None
        origin = until = 0.0
        for stamp, frame in in_display_order(stream):
            if before is None:
                origin = stream.seconds_at(stamp)
            else:
                # Time stamps of damaged files can jump forwards and backwards.
                until = min(max(stream.seconds_at(stamp) - origin, until), until + _LONGEST)
                yield until, partial(pictures.tensor, before)
            before = frame
        if before is not None:
            end = until + 1 / stream.info.fps
            damage = stream.message or _missing_end(stream, end)
            if damaged is not None and damage:
                damaged(damage)
            yield end, partial(pictures.tensor, before)


def _missing_end(stream: Stream, end: float) -> str:
    """Return a text if a video ends long before the time that its file states, or ``""``."""
    stated = stream.stated_seconds or 0.0
    if end >= _WHOLE * stated - 1.0:
        return ""
    return f"the file ends after {end:.1f} of {stated:.1f} seconds"
