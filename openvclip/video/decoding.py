"""From a video file to the frames of a clip.

Frames that are not asked for are decoded, because others depend on them, but neither converted to
RGB nor kept: memory holds the frames asked for and a few more, whatever the length of the video.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from openvclip.errors import VideoError
from openvclip.video._stream import (
    Stream,
    check_path,
    decoder_errors,
    index_packets,
    require_av,
    with_count,
)
from openvclip.video._torchcodec import decode_frames, require_torchcodec
from openvclip.video.sampling import Backend, Sampler, Sampling, Window, plan, select

if TYPE_CHECKING:
    import av

__all__ = ["read_clip"]

# Frames of a window are put in the order of their time stamps (AVI files with B-frames come out
# of it); codecs reorder over at most 16 frames.
REORDER = 16
# Seeking goes back to a key frame, which are seconds apart: jumping over less gains nothing.
_WORTH_A_SEEK = 4.0
# Key frames are found by decoding time, which runs ahead of presentation time with B-frames.
_SEEK_MARGIN = 0.5


def read_clip(
    path: str | os.PathLike[str],
    *,
    num_frames: int = 8,
    sampling_rate: int = 16,
    target_fps: float = 30,
    views: int = 1,
    sampler: Sampler = "released",
    backend: Backend = "pyav",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Reads the frames that a model sees of a video file.

    Args:
        path: a video file in any container and codec that FFmpeg reads.
        num_frames: T, frames in a view.
        sampling_rate: distance of two frames of a view, counted at ``target_fps``.
        target_fps: frames per second that ``sampling_rate`` refers to.
        views: V, clips taken from the video, spread over its length.
        sampler: ``"released"`` (the released Open-VCLIP test path), ``"uniform"`` (segment centres
            over the whole video, ViFi-CLIP) or ``"dense"`` (the released training path: a random
            start); see :mod:`openvclip.video.sampling`.
        backend: ``"pyav"``, or ``"torchcodec"`` where that can be loaded. The frames are the same.
            torchcodec relies on the time stamps in the packets: files that lack them (AVI and
            MPEG-TS with B-frames), or that are damaged, are decoded by PyAV all the same.
        generator: source of the random starts of ``"dense"``.

    Returns:
        uint8 RGB ``[V, T, C, H, W]`` on the CPU, H and W as the video is shown: rotation metadata
        is applied, which the released code does not do. An alpha channel is dropped, grey is
        repeated over the three channels, more than 8 bits are rounded to 8.

    A video that is shorter than a view repeats its last frame. So does a file that breaks off or
    is damaged in the middle: what can be decoded is used, and only a file that gives no frame at
    all is an error. Should the size of the frames change on the way, all are scaled to the first.

    Raises:
        VideoNotFoundError: there is no such file.
        VideoError: a directory, an empty file, no video stream, or nothing that can be decoded.
        VideoOptionError: an unknown sampler or backend, or a number out of range.
        MissingDependencyError: PyAV is not installed, or torchcodec asked for and can't be loaded.

    Source: the released code of Open-VCLIP (PySlowFast's PyAV path).
    """
    sampling = Sampling(num_frames, sampling_rate, target_fps, views, sampler, backend)
    require_av()
    if backend == "torchcodec":
        require_torchcodec()
    full = check_path(path)
    with Stream(full) as stream:
        info, stamps = stream.info, None
        counting = not info.timed or (sampler == "uniform" and stream.seekable)
        if counting or backend == "torchcodec":
            index = index_packets(full)
            info, stamps = with_count(info, index.count) if counting else info, index.stamps
        windows = plan(info, sampling, generator)
        video = None
        if backend == "torchcodec" and stamps and stream.in_order:
            numbers = [number for window in windows for number in select(stamps, window)]
            video = decode_frames(full, numbers, len(stamps))
        if video is None:
            video = _decode(stream, windows, stamps if stream.seekable else None)
    return video.view(len(windows), num_frames, *video.shape[1:])


def _decode(stream: Stream, windows: Sequence[Window], stamps: Sequence[int] | None) -> Tensor:
    """uint8 ``[V * T, C, H, W]`` with PyAV."""
    parts = _parts(windows, stamps)
    pickers = _collect(stream, parts)
    frames = [
        frame
        for view in range(len(windows))
        for part, picker in zip(parts, pickers, strict=True)
        if part.view == view
        for frame in picker.chosen()
    ]
    with decoder_errors(stream.path):
        return frames_to_tensor(frames)


@dataclass(frozen=True)
class _Part:
    view: int
    window: Window


def _parts(windows: Sequence[Window], stamps: Sequence[int] | None) -> list[_Part]:
    """The windows; those that count from the first frame as one small window for each frame.

    With the time stamps of the packets known, frame number n is "the frame at stamps[n]", which
    can be reached by a seek.
    """
    parts = []
    for view, window in enumerate(windows):
        if window.start is not None or not stamps:
            parts.append(_Part(view, window))
            continue
        for offset in window.offsets:
            stamp = stamps[min(offset, len(stamps) - 1)]
            parts.append(_Part(view, Window(stamp, stamp, (0,))))
    return parts


@dataclass
class _Picker:
    """Picks the frames of one window from a stream that goes by; equals ``sampling.select``."""

    window: Window
    done: bool = False
    _count: int = 0
    _waiting: dict[int, av.VideoFrame] = field(default_factory=dict)
    _kept: dict[int, av.VideoFrame] = field(default_factory=dict)
    _last: av.VideoFrame | None = None

    def feed(self, stamp: int, frame: av.VideoFrame) -> None:
        start, end = self.window.start, self.window.end
        if start is None:
            self._take(frame)
            return
        if stamp < start:
            return
        self._waiting[stamp] = frame
        if end is not None and stamp > end:
            self.finish()
        elif len(self._waiting) > REORDER:
            self._take(self._waiting.pop(min(self._waiting)))

    def finish(self) -> None:
        """Nothing more comes, or is wanted."""
        for stamp in sorted(self._waiting):
            self._take(self._waiting[stamp])
        self._waiting.clear()
        self.done = True

    @property
    def empty(self) -> bool:
        return self._last is None

    def fall_back(self, frame: av.VideoFrame) -> None:
        """Gives a window that lies behind the end of the video its last frame."""
        if self.empty:
            self._last = frame

    def chosen(self) -> list[av.VideoFrame]:
        assert self._last is not None
        return [self._kept.get(offset, self._last) for offset in self.window.offsets]

    def _take(self, frame: av.VideoFrame) -> None:
        if self.done:
            return
        if self._count in self.window.offsets:
            self._kept[self._count] = frame
        self._last = frame
        self.done = self._count >= self.window.offsets[-1]
        self._count += 1


class _SeekMissedError(Exception):
    """A seek landed behind the frame that it should have reached."""


def _collect(stream: Stream, parts: Sequence[_Part]) -> list[_Picker]:
    if stream.seekable and all(part.window.start is not None for part in parts):
        try:
            pickers = [_Picker(part.window) for part in parts]
            _run(stream, pickers, seek=True)
            if not any(picker.empty for picker in pickers):
                return pickers
        except (_SeekMissedError, VideoError):
            pass  # read from the beginning: slower, and right for every container
        with Stream(stream.path) as fresh:
            return _collect_in_order(fresh, parts)
    return _collect_in_order(stream, parts)


def _collect_in_order(stream: Stream, parts: Sequence[_Part]) -> list[_Picker]:
    pickers = [_Picker(part.window) for part in parts]
    last = _run(stream, pickers, seek=False)
    if last is None:
        reason = f": FFmpeg says {stream.message!r}" if stream.message else ""
        raise VideoError(
            f"{stream.path}: decoded 0 frames{reason}. The file is truncated, damaged or not a "
            "video; copy or download it again."
        )
    for picker in pickers:
        picker.fall_back(last)
    return pickers


def _run(stream: Stream, pickers: Sequence[_Picker], *, seek: bool) -> Any:
    """Feeds the pickers; returns the last frame decoded, or None."""
    last = None
    gap = stream.ticks(_WORTH_A_SEEK)
    for group in _groups(pickers, gap) if seek else [list(pickers)]:
        start = group[0].window.start
        landed = True
        if seek and start is not None and start - stream.position > gap:
            stream.seek(start - stream.ticks(_SEEK_MARGIN))
            landed = False
        for stamp, frame in stream.frames():
            if not landed and start is not None and stamp > start:
                raise _SeekMissedError
            landed, last = True, frame
            for picker in group:
                if not picker.done:
                    picker.feed(stamp, frame)
            if all(picker.done for picker in group):
                break
        for picker in group:
            picker.finish()
    return last


def _groups(pickers: Sequence[_Picker], gap: int) -> list[list[_Picker]]:
    """Windows that are read in one go: those that overlap or lie close together."""
    groups: list[list[_Picker]] = []
    reach = 0
    for picker in sorted(pickers, key=lambda item: item.window.start or 0):
        start = picker.window.start or 0
        end = start if picker.window.end is None else max(picker.window.end, start)
        if groups and start - reach <= gap:
            groups[-1].append(picker)
            reach = max(reach, end)
        else:
            groups.append([picker])
            reach = end
    return groups


def frames_to_tensor(frames: Sequence[av.VideoFrame]) -> Tensor:
    """uint8 ``[N, C, H, W]``; a frame that is taken several times is converted once."""
    # One for all frames: each would otherwise make a scaler of its own, some megabytes large.
    scaler = require_av().video.reformatter.VideoReformatter()
    first = frames[0]
    turns = _quarter_turns(first)
    pictures: dict[int, np.ndarray[Any, Any]] = {}
    for frame in frames:
        if id(frame) not in pictures:
            rgb = scaler.reformat(frame, first.width, first.height, "rgb24")
            pictures[id(frame)] = np.rot90(rgb.to_ndarray(), turns)
    height, width, channels = pictures[id(first)].shape
    video = np.empty((len(frames), channels, height, width), dtype=np.uint8)
    for row, frame in zip(video, frames, strict=True):
        # In NumPy: PyTorch spreads such a copy over all cores, which takes 10 ms of waiting where
        # the cores are shared (measured on 2 cores; 0.1 ms here for 320x240).
        np.copyto(row, pictures[id(frame)].transpose(2, 0, 1))
    return torch.from_numpy(video)


def _quarter_turns(frame: av.VideoFrame) -> int:
    # FFmpeg gives the turn that shows the frame upright, in degrees against the clock; PyAV before
    # 14 does not pass it on.
    return round(getattr(frame, "rotation", 0) / 90) % 4
