"""Which frames of a video make a clip: pure functions on what a container says about its stream.

A sampler turns a :class:`StreamInfo` into one :class:`Window` for each view; the decoder
(:mod:`openvclip.video.decoding`) picks the frames while the stream goes by. :func:`select` is the
same choice written on a list of time stamps, for tests and for planning without decoding.

Units: *ticks* are the stream's time base, *frames* are counted from 0.

The names: ``"released"`` is what the released Open-VCLIP code does at test time (PySlowFast's PyAV
path), ``"dense"`` the same window at a random start (its training), ``"uniform"`` the centre of
each of ``num_frames`` equal segments (ViFi-CLIP).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from openvclip.errors import VideoOptionError

__all__ = [
    "BACKENDS",
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

Sampler = Literal["released", "uniform", "dense"]
"""The rule that places the frames of a clip; see :class:`Sampling`."""

Backend = Literal["pyav", "torchcodec"]
"""The library that decodes."""

SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)
BACKENDS: tuple[Backend, ...] = get_args(Backend)


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are read, and by which decoder.

    Attributes:
        num_frames: frames in a view, T.
        sampling_rate: distance between two frames of a view, in frames at ``target_fps``. Ignored
            by ``"uniform"``, which spans the whole video.
        target_fps: the frame rate in which ``sampling_rate`` counts, frames per second.
        views: clips taken from each video, V.
        sampler: ``"released"`` (the released Open-VCLIP test path), ``"uniform"`` (centres of equal
            segments, ViFi-CLIP) or ``"dense"`` (the released training path: a random start).
        backend: ``"pyav"`` or ``"torchcodec"``. Both give the same frames.

    Raises:
        VideoOptionError: an unknown sampler or backend, or a number out of range.
    """

    num_frames: int = 8
    sampling_rate: int = 16
    target_fps: float = 30
    views: int = 1
    sampler: Sampler = "released"
    backend: Backend = "pyav"

    def __post_init__(self) -> None:
        for name in ("num_frames", "sampling_rate", "views"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise VideoOptionError(f"{name}={value!r}: expected a whole number of at least 1.")
        if not (math.isfinite(self.target_fps) and self.target_fps > 0):
            raise VideoOptionError(
                f"target_fps={self.target_fps!r}: expected frames per second above 0."
            )
        known: tuple[str, tuple[str, ...]]
        for known in (("sampler", SAMPLERS), ("backend", BACKENDS)):
            value = getattr(self, known[0])
            if value not in known[1]:
                names = ", ".join(map(repr, known[1]))
                raise VideoOptionError(f"{known[0]}={value!r} is not known: choose one of {names}.")

    def with_(self, **changes: Any) -> Sampling:
        """A copy with some attributes changed."""
        return replace(self, **changes)


PAPER_SAMPLING = Sampling(views=3)
"""The paper's evaluation: 3 views of 8 frames, 16 frames apart at 30 frames per second."""


@dataclass(frozen=True)
class StreamInfo:
    """What a container says about its video stream.

    Attributes:
        fps: average frame rate, frames per second.
        frames: the number of frames, or ``None`` when the container does not say.
        duration: the length in ticks, or ``None`` when the container does not say.
        start: the time stamp of the first frame in ticks; above 0 for streams that start late.
        counted: ``frames`` were counted from the packets because the container does not say; then
            views are placed by frame number, not by time stamp.
    """

    fps: float
    frames: int | None = None
    duration: int | None = None
    start: int = 0
    counted: bool = False

    @property
    def timed(self) -> bool:
        """True when the container gives both a frame count and a duration."""
        return self.frames is not None and self.duration is not None and not self.counted


@dataclass(frozen=True)
class Window:
    """One view: where in the stream it lies, and which frames of it are taken.

    Attributes:
        start: the first time stamp that belongs to the window, in ticks; ``None`` means that the
            window is the whole stream in the order in which it is decoded.
        end: the last time stamp; the first decoded frame beyond it still belongs to the window and
            closes it. ``None`` leaves the window open.
        offsets: the frames taken, counted inside the window in the order of their time stamps;
            never falling, and an offset beyond the window means its last frame.
    """

    start: int | None
    end: int | None
    offsets: tuple[int, ...]


def plan(
    info: StreamInfo,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
) -> list[Window]:
    """Place the views of one video.

    With one view, ``"released"`` takes the beginning of the video if the container gives a
    duration, and the centre if it does not: the released code has both rules. In a stream that
    starts late, views are placed from its first frame on; the released code places them from time
    0.

    Args:
        info: the stream. ``frames`` must be known; count the frames where the container does not
            give their number.
        sampling: which frames to take; ``Sampling()`` by default.
        generator: source of the random starts of ``"dense"``; the global generator by default.

    Returns:
        V windows with ``num_frames`` offsets each.

    Source: the released code of Open-VCLIP (PySlowFast's PyAV path) and of ViFi-CLIP (uniform).
    """
    sampling = sampling or Sampling()
    if sampling.sampler == "dense":
        return _dense(info, sampling, generator)
    return _released(info, sampling) if sampling.sampler == "released" else _uniform(info, sampling)


def select(timestamps: Sequence[int], window: Window) -> list[int]:
    """The frames that a window takes from a fully decoded stream.

    Args:
        timestamps: the time stamp of every frame in ticks, in the order in which the decoder gives
            them. They may run back (AVI files with B-frames do): the released code sorts by time
            stamp inside the window, and so does this.
        window: the view.

    Returns:
        One index into ``timestamps`` for each of ``window.offsets``. A window that lies behind the
        last frame takes that frame.
    """
    if not timestamps:
        return []
    if window.start is None:
        inside = list(range(len(timestamps)))
    else:
        inside = _inside(timestamps, window.start, window.end) or [len(timestamps) - 1]
    return [inside[min(offset, len(inside) - 1)] for offset in window.offsets]


def _inside(timestamps: Sequence[int], start: int, end: int | None) -> list[int]:
    kept: dict[int, int] = {}
    for index, stamp in enumerate(timestamps):
        if stamp < start:
            continue
        kept[stamp] = index  # of frames with the same time stamp the last one counts, as released
        if end is not None and stamp > end:
            break
    return [kept[stamp] for stamp in sorted(kept)]


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
    # V views share the segments: view v looks at (v + 1/2) / V of each, so one view at its centre.
    segment = max(info.frames or 0, 1) / sampling.num_frames
    windows = []
    for view in range(sampling.views):
        inside = (view + 0.5) / sampling.views
        offsets = tuple(int((i + inside) * segment) for i in range(sampling.num_frames))
        windows.append(Window(None, None, offsets))
    return windows


def _span(info: StreamInfo, sampling: Sampling) -> int:
    """S, how many frames of the stream the released code decodes for one view."""
    seconds = sampling.sampling_rate * (sampling.num_frames - 1) / sampling.target_fps
    return max(1, math.ceil(seconds * info.fps))


def _spare(info: StreamInfo, sampling: Sampling) -> int:
    return max((info.frames or 0) - _span(info, sampling), 0)


def _clip_length(info: StreamInfo, sampling: Sampling) -> float:
    """The length of a clip in frames of the stream: a fraction, 128 / 30 * fps as released."""
    return sampling.num_frames * sampling.sampling_rate / sampling.target_fps * info.fps


def _timed(info: StreamInfo, sampling: Sampling, start: float) -> Window:
    """The window whose first frame is number ``start``, a fraction, by time stamp."""
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
    end = start + max(_clip_length(info, sampling) - 1, 0.0)  # below 1 frame at tiny rates
    last = max((info.frames or 0) - 1, 0)
    offsets = _spread(start, end, sampling.num_frames)
    return Window(None, None, tuple(min(offset, last) for offset in offsets))


def _spread(first: float, last: float, count: int) -> tuple[int, ...]:
    # torch.linspace in float32 as released: its rounding decides some of the frames.
    values = torch.linspace(first, last, count).clamp(min=0).long().tolist()
    return tuple(int(value) for value in values)
