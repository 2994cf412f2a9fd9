"""Frame sampling: choose the frames of a clip from the metadata of a video stream.

:func:`plan` turns a :class:`StreamInfo` into one :class:`Window` for each view. The decoder
(:mod:`openvclip.video.decoding`) takes the frames of the windows while it decodes the stream.
:func:`select` chooses the same frames from a list of time stamps, for tests and for planning
without decoding.

Units: *ticks* are the time base of the stream; *frames* are counted from 0.

Samplers: ``"released"`` is the sampling of the released Open-VCLIP code at test time (PySlowFast's
PyAV path). ``"dense"`` is the sampling of the same code in training: the same window at a random
start. ``"uniform"`` is the centre of each of ``num_frames`` equal segments, as in ViFi-CLIP.
``"seconds"`` is one frame for each second, at most ``num_frames``, as in text-to-video retrieval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
import torch

from openvclip.errors import VideoOptionError

__all__ = [
    "BACKENDS",
    "BY_NUMBER",
    "PAPER_SAMPLING",
    "SAMPLERS",
    "Backend",
    "Sampler",
    "Sampling",
    "StreamInfo",
    "Window",
    "plan",
    "select",
]

Sampler = Literal["released", "uniform", "dense", "seconds"]
"""The rule that chooses the frames of a clip; see :class:`Sampling`."""

Backend = Literal["pyav", "torchcodec"]
"""The library that decodes video files."""

SAMPLERS: tuple[Sampler, ...] = ("released", "uniform", "dense")
"""The samplers whose views all have ``num_frames`` frames. ``"seconds"`` is the other sampler."""
BACKENDS: tuple[Backend, ...] = get_args(Backend)
"""All backends."""
BY_NUMBER: tuple[Sampler, ...] = ("uniform", "seconds")
"""The samplers that choose frames by their numbers, not by their times."""

_MOST_FRAMES = 2**16  # frames of all views together; a video of 30 frames per second has 36 minutes
_LONGEST = 1e6  # the largest sampling rate, and the largest frame rate


@dataclass(frozen=True)
class Sampling:
    """The frames to read from a video, and the decoder.

    Which frames of a file are counted (edit lists, wrong headers), and what is done with their
    pixels (rotation, sample aspect ratio, HDR): see :func:`~openvclip.video.read_clip`.

    Attributes:
        num_frames: T, the number of frames in a view. For ``"seconds"``, the largest number of
            frames: a short video has fewer.
        sampling_rate: distance between two frames of a view, in frames at ``target_fps``. The
            samplers ``"uniform"`` and ``"seconds"`` ignore it.
        target_fps: the frame rate to which ``sampling_rate`` refers, in frames per second.
        views: V, the number of clips taken from each video.
        sampler: ``"released"`` (the test path of the released Open-VCLIP code), ``"uniform"``
            (centres of equal segments, ViFi-CLIP), ``"dense"`` (the training path of the released
            Open-VCLIP code: a random start) or ``"seconds"`` (a frame for each second, CLIP4Clip).
        backend: ``"pyav"`` or ``"torchcodec"``. Both return the same frames.
        last_second: ``"seconds"`` takes no frame after this second of a video. 31 for DiDeMo.
            Default: the whole video.

    The frames of all views are in memory together, so ``num_frames * views`` is at most 65,536.
    ``sampling_rate`` is at most 1,000,000, and ``target_fps`` lies between 0.000001 and 1,000,000.

    Raises:
        VideoOptionError: ``sampler`` or ``backend`` is not known, a number is out of range,
            ``"seconds"`` has several views, or another sampler has a ``last_second``.
    """

    num_frames: int = 8
    sampling_rate: int = 16
    target_fps: float = 30
    views: int = 1
    sampler: Sampler = "released"
    backend: Backend = "pyav"
    last_second: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "sampling_rate", "views"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise VideoOptionError(f"{name}={value!r}: expected a whole number of at least 1.")
        if self.num_frames * self.views > _MOST_FRAMES:
            raise VideoOptionError(
                f"num_frames={self.num_frames} and views={self.views}: these are more than "
                f"{_MOST_FRAMES} frames, which are in memory together. Give fewer."
            )
        if self.sampling_rate > _LONGEST:
            raise VideoOptionError(
                f"sampling_rate={self.sampling_rate}: expected at most {_LONGEST:,.0f} frames."
            )
        if not _is_rate(self.target_fps):
            raise VideoOptionError(
                f"target_fps={self.target_fps!r}: expected frames per second above 0, from "
                f"{1 / _LONGEST:.6f} to {_LONGEST:,.0f}."
            )
        choices: dict[str, tuple[str, ...]] = {"sampler": get_args(Sampler), "backend": BACKENDS}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                names = ", ".join(map(repr, known))
                raise VideoOptionError(f"{name}={value!r} is not known: choose one of {names}.")
        self._check_seconds()

    def _check_seconds(self) -> None:
        last = self.last_second
        if self.sampler == "seconds" and self.views != 1:
            raise VideoOptionError(
                f"views={self.views} with the sampler 'seconds', whose frames span the whole "
                "video: expected views=1."
            )
        if last is None:
            return
        if self.sampler != "seconds":
            raise VideoOptionError(
                f"last_second={last!r} with the sampler {self.sampler!r}: only 'seconds' uses it."
            )
        if isinstance(last, bool) or not isinstance(last, int) or last < 0:
            raise VideoOptionError(f"last_second={last!r}: expected a whole number of at least 0.")

    def with_(self, **changes: Any) -> Sampling:
        """Return a copy with some attributes changed."""
        return replace(self, **changes)


def _is_rate(value: object) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number and 1 / _LONGEST <= float(value) <= _LONGEST  # type: ignore[arg-type]


PAPER_SAMPLING = Sampling(views=3)
"""The paper's evaluation: 3 views of 8 frames, 16 frames apart at 30 frames per second."""


@dataclass(frozen=True)
class StreamInfo:
    """The metadata of a video stream, of the frames that a player shows.

    Attributes:
        fps: average frame rate, in frames per second.
        frames: the number of frames, or ``None`` if the container does not give it.
        duration: the duration in ticks, or ``None`` if the container does not give it.
        start: the time stamp of the first frame in ticks. It is above 0 for streams that start
            late.
        counted: whether ``frames`` was counted from the packets. Then views are placed by frame
            number instead of time stamp.
    """

    fps: float
    frames: int | None = None
    duration: int | None = None
    start: int = 0
    counted: bool = False

    @property
    def timed(self) -> bool:
        """Whether the container gives both the number of frames and the duration."""
        return self.frames is not None and self.duration is not None and not self.counted


@dataclass(frozen=True)
class Window:
    """A view: a part of the stream, and the frames to take from this part.

    Attributes:
        start: the first time stamp of the window, in ticks. ``None`` means that the window is the
            whole stream in decoding order.
        end: the last time stamp of the window, in ticks. The first decoded frame after ``end``
            still belongs to the window and closes it. ``None`` means that the window has no end.
        offsets: indices of the frames to take, counted from the start of the window in the order of
            the time stamps. The indices never decrease. An index beyond the window means the last
            frame of the window.
    """

    start: int | None
    end: int | None
    offsets: tuple[int, ...]


def plan(
    info: StreamInfo,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
) -> list[Window]:
    """Compute the window of each view of a video.

    With one view, ``"released"`` takes the beginning of the video if the container gives a
    duration, and the centre of the video otherwise. The released code has both rules. If a stream
    starts late, the first view starts at its first frame; in the released code it starts at time 0.

    Args:
        info: metadata of the stream. ``info.frames`` must be known: if the container does not give
            the number of frames, count the frames first.
        sampling: the frames to take. Default: ``Sampling()``.
        generator: random number generator for the starts of ``"dense"``. Default: the global
            generator.

    Returns:
        V windows with ``num_frames`` offsets each; for ``"seconds"``, a window with at most
        ``num_frames`` offsets.

    Source: the released code of Open-VCLIP (PySlowFast's PyAV path), of ViFi-CLIP (uniform) and of
    CLIP4Clip (seconds).
    """
    sampling = sampling or Sampling()
    if sampling.sampler == "dense":
        return _dense(info, sampling, generator)
    if sampling.sampler == "seconds":
        return _seconds(info, sampling)
    return _released(info, sampling) if sampling.sampler == "released" else _uniform(info, sampling)


def select(timestamps: Sequence[int], window: Window) -> list[int]:
    """Choose the frames of a window from a fully decoded stream.

    Args:
        timestamps: the time stamp of every frame in ticks, in decoding order. Time stamps can
            decrease, for example in AVI files with B-frames. Frames inside the window are sorted by
            time stamp, as in the released code.
        window: the window.

    Returns:
        One index into ``timestamps`` for each of ``window.offsets``. A window after the last frame
        takes the last frame.
    """
    if not timestamps:
        return []
    if window.start is None:
        inside = list(range(len(timestamps)))
    else:
        inside = _inside(timestamps, window.start, window.end) or [len(timestamps) - 1]
    return [inside[min(offset, len(inside) - 1)] for offset in window.offsets]


def _inside(timestamps: Sequence[int], start: int, end: int | None) -> list[int]:
    index_of: dict[int, int] = {}
    for index, stamp in enumerate(timestamps):
        if stamp < start:
            continue
        # Of several frames with one time stamp, the last frame counts, as in the released code.
        index_of[stamp] = index
        if end is not None and stamp > end:
            break
    return [index_of[stamp] for stamp in sorted(index_of)]


def _released(info: StreamInfo, sampling: Sampling) -> list[Window]:
    if not info.timed:
        return _released_by_number(info, sampling)
    delta = _spare(info, sampling)
    return [_timed(info, sampling, delta * view / sampling.views) for view in range(sampling.views)]


def _dense(info: StreamInfo, sampling: Sampling, generator: torch.Generator | None) -> list[Window]:
    draws = [float(torch.rand((), generator=generator)) for _ in range(sampling.views)]
    if info.timed:
        delta = _spare(info, sampling)
        return [_timed(info, sampling, delta * draw) for draw in draws]
    length = _clip_length(info, sampling)
    spare = max((info.frames or 0) - length, 0.0)
    return [_numbered(info, sampling, spare * draw) for draw in draws]


def _uniform(info: StreamInfo, sampling: Sampling) -> list[Window]:
    # V views share the segments. View v takes the frame at (v + 1/2) / V of each segment, so a
    # single view takes the centre.
    segment = max(info.frames or 0, 1) / sampling.num_frames
    windows = []
    for view in range(sampling.views):
        inside = (view + 0.5) / sampling.views
        offsets = tuple(int((i + inside) * segment) for i in range(sampling.num_frames))
        windows.append(Window(None, None, offsets))
    return windows


def _seconds(info: StreamInfo, sampling: Sampling) -> list[Window]:
    # The frame rate is rounded down, as in the released code. Below one frame per second, each
    # frame is taken.
    numbers = range(0, max(info.frames or 0, 1), max(int(info.fps), 1))
    if sampling.last_second is not None:
        numbers = numbers[: sampling.last_second + 1]
    if len(numbers) > sampling.num_frames:
        places = np.linspace(0, len(numbers) - 1, sampling.num_frames, dtype=int).tolist()
        return [Window(None, None, tuple(numbers[place] for place in places))]
    return [Window(None, None, tuple(numbers))]


def _span(info: StreamInfo, sampling: Sampling) -> int:
    """S, the number of frames that the released code decodes for one view."""
    seconds = sampling.sampling_rate * (sampling.num_frames - 1) / sampling.target_fps
    return max(1, math.ceil(seconds * info.fps))


def _spare(info: StreamInfo, sampling: Sampling) -> int:
    return max((info.frames or 0) - _span(info, sampling), 0)


def _clip_length(info: StreamInfo, sampling: Sampling) -> float:
    """The length of a clip in frames of the stream, not rounded; by default 128 / 30 * fps."""
    return sampling.num_frames * sampling.sampling_rate / sampling.target_fps * info.fps


def _timed(info: StreamInfo, sampling: Sampling, start: float) -> Window:
    """Return a window of time stamps. It begins at frame ``start``, which can be fractional."""
    tick = (info.duration or 0) / max(info.frames or 0, 1)
    end = start + _span(info, sampling) - 1
    offsets = _spread(0.0, _clip_length(info, sampling) - 1, sampling.num_frames)
    return Window(info.start + int(start * tick), info.start + int(end * tick), offsets)


def _released_by_number(info: StreamInfo, sampling: Sampling) -> list[Window]:
    frames, views = info.frames or 0, sampling.views
    spare = max(frames - _clip_length(info, sampling), 0.0)
    starts = [spare // 2] if views == 1 else [spare // (views - 1) * view for view in range(views)]
    return [_numbered(info, sampling, start) for start in starts]


def _numbered(info: StreamInfo, sampling: Sampling, start: float) -> Window:
    end = start + max(_clip_length(info, sampling) - 1, 0.0)  # the length can be below 1 frame
    last = max((info.frames or 0) - 1, 0)
    offsets = _spread(start, end, sampling.num_frames)
    return Window(None, None, tuple(min(offset, last) for offset in offsets))


def _spread(first: float, last: float, count: int) -> tuple[int, ...]:
    # torch.linspace in float32, as in the released code: the rounding of float32 decides which
    # frames are taken.
    values = torch.linspace(first, last, count).clamp(min=0).long().tolist()
    return tuple(int(value) for value in values)
