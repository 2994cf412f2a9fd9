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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from openvclip.errors import VideoOptionError

__all__ = ["SAMPLERS", "StreamInfo", "Window", "plan", "select"]


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


@dataclass(frozen=True)
class _Request:
    num_frames: int
    sampling_rate: int
    target_fps: float
    views: int
    generator: torch.Generator | None


def plan(
    info: StreamInfo,
    *,
    num_frames: int = 8,
    sampling_rate: int = 16,
    target_fps: float = 30,
    views: int = 1,
    sampler: str = "released",
    generator: torch.Generator | None = None,
) -> list[Window]:
    """Places the views of one video.

    Args:
        info: the stream; ``frames`` must be known, counted if need be.
        num_frames: T, frames in a view.
        sampling_rate: distance of two frames of a view, in frames at ``target_fps``; not used by
            ``"uniform"``, which spans the whole video.
        target_fps: the frame rate that ``sampling_rate`` counts in, frames per second.
        views: V, how many clips to take from the video.
        sampler: ``"released"``, ``"uniform"`` or ``"dense"``.
        generator: source of the random starts of ``"dense"``; the global one when ``None``.

    Returns:
        V windows with ``num_frames`` offsets each.

    Raises:
        VideoOptionError: an unknown sampler, or a number out of range.

    One view is the beginning of the video for ``"released"`` when the container gives a duration,
    and its centre when it does not: the released code has both rules. In a stream that starts late
    views are placed from its first frame on; the released code places them from time 0.

    Source: the released code of Open-VCLIP (PySlowFast's PyAV path) and of ViFi-CLIP (uniform).
    """
    check_options(num_frames, sampling_rate, target_fps, views, sampler)
    request = _Request(num_frames, sampling_rate, float(target_fps), views, generator)
    return _SAMPLERS[sampler](info, request)


def check_options(
    num_frames: int, sampling_rate: int, target_fps: float, views: int, sampler: str
) -> None:
    """Raises :class:`VideoOptionError` for options that no video could satisfy."""
    for name, value in (
        ("num_frames", num_frames),
        ("sampling_rate", sampling_rate),
        ("views", views),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise VideoOptionError(f"{name}={value!r}: expected a whole number of at least 1.")
    if not (math.isfinite(target_fps) and target_fps > 0):
        raise VideoOptionError(f"target_fps={target_fps!r}: expected frames per second above 0.")
    if sampler not in _SAMPLERS:
        raise VideoOptionError(
            f"sampler={sampler!r} is not known: choose one of {', '.join(map(repr, SAMPLERS))}."
        )


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


def _released(info: StreamInfo, request: _Request) -> list[Window]:
    if not info.timed:
        return _released_by_number(info, request)
    delta = _spare(info, request)
    return [_timed(info, request, delta * view / request.views) for view in range(request.views)]


def _dense(info: StreamInfo, request: _Request) -> list[Window]:
    draws = [float(torch.rand((), generator=request.generator)) for _ in range(request.views)]
    if info.timed:
        delta = _spare(info, request)
        return [_timed(info, request, delta * draw) for draw in draws]
    length = _clip_length(info, request)
    spare = max((info.frames or 0) - length, 0.0)
    return [_numbered(info, request, spare * draw) for draw in draws]


def _uniform(info: StreamInfo, request: _Request) -> list[Window]:
    # V views share the segments: view v looks at (v + 1/2) / V of each, so one view at its centre.
    segment = max(info.frames or 0, 1) / request.num_frames
    windows = []
    for view in range(request.views):
        inside = (view + 0.5) / request.views
        offsets = tuple(int((i + inside) * segment) for i in range(request.num_frames))
        windows.append(Window(None, None, offsets))
    return windows


_SAMPLERS: dict[str, Callable[[StreamInfo, _Request], list[Window]]] = {
    "released": _released,
    "uniform": _uniform,
    "dense": _dense,
}
SAMPLERS: tuple[str, ...] = tuple(_SAMPLERS)
"""The names that ``sampler=`` takes."""


def _span(info: StreamInfo, request: _Request) -> int:
    """S, how many frames of the stream the released code decodes for one view."""
    seconds = request.sampling_rate * (request.num_frames - 1) / request.target_fps
    return max(1, math.ceil(seconds * info.fps))


def _spare(info: StreamInfo, request: _Request) -> int:
    return max((info.frames or 0) - _span(info, request), 0)


def _clip_length(info: StreamInfo, request: _Request) -> float:
    """The length of a clip in frames of the stream: a fraction, 128 / 30 * fps as released."""
    return request.num_frames * request.sampling_rate / request.target_fps * info.fps


def _timed(info: StreamInfo, request: _Request, start: float) -> Window:
    """The window whose first frame is number ``start``, a fraction, by time stamp."""
    tick = (info.duration or 0) / max(info.frames or 0, 1)
    end = start + _span(info, request) - 1
    offsets = _spread(0.0, _clip_length(info, request) - 1, request.num_frames)
    return Window(info.start + int(start * tick), info.start + int(end * tick), offsets)


def _released_by_number(info: StreamInfo, request: _Request) -> list[Window]:
    frames, views = info.frames or 0, request.views
    spare = max(frames - _clip_length(info, request), 0.0)
    starts = [spare // 2] if views == 1 else [spare // (views - 1) * view for view in range(views)]
    return [_numbered(info, request, start) for start in starts]


def _numbered(info: StreamInfo, request: _Request, start: float) -> Window:
    end = start + max(_clip_length(info, request) - 1, 0.0)  # below 1 frame at tiny rates
    last = max((info.frames or 0) - 1, 0)
    offsets = _spread(start, end, request.num_frames)
    return Window(None, None, tuple(min(offset, last) for offset in offsets))


def _spread(first: float, last: float, count: int) -> tuple[int, ...]:
    # torch.linspace in float32 as released: its rounding decides some of the frames.
    values = torch.linspace(first, last, count).clamp(min=0).long().tolist()
    return tuple(int(value) for value in values)
