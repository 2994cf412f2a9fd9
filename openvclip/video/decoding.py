"""Read the frames of a clip from a video file.

A clip consists of some frames of a video, but the decoder must also decode the frames between them.
Only the frames of the clip are converted to RGB and kept, so the memory does not grow with the
length of the video.
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

# Frames of a window are sorted by time stamp, because in AVI files with B-frames the time stamps of
# the decoded frames do not increase. Codecs reorder at most 16 frames.
REORDER = 16
# In seconds. Frames up to this distance are reached by decoding, not by a seek. A seek lands on a
# key frame, and key frames are seconds apart, so a short seek saves no time.
_WORTH_A_SEEK = 4.0
# In seconds. A seek aims this much before the frame. It finds key frames by their decoding times.
# With B-frames, decoding times are earlier than presentation times, so without the margin a seek
# could land after the frame.
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
    """Read one or more clips from a video file.

    The keywords are the attributes of :class:`~openvclip.video.Sampling`.

    Args:
        path: a video file in any container and codec that FFmpeg can read.
        num_frames: T, the number of frames in a view.
        sampling_rate: distance between two frames of a view, in frames at ``target_fps``.
        target_fps: the frame rate to which ``sampling_rate`` refers, in frames per second.
        views: V, the number of clips taken from the video. The clips are spread over its length.
        sampler: ``"released"`` (the test path of the released Open-VCLIP code), ``"uniform"``
            (centres of equal segments of the whole video, ViFi-CLIP) or ``"dense"`` (the training
            path of the released code: a random start); see :mod:`openvclip.video.sampling`.
        backend: ``"pyav"`` or ``"torchcodec"``. Both return the same frames. torchcodec needs
            right time stamps in the packets. Damaged files and files without these time stamps (AVI
            and MPEG-TS with B-frames) are always decoded by PyAV.
        generator: random number generator for the starts of ``"dense"``. Default: the global
            generator.

    Returns:
        uint8 RGB ``[V, T, C, H, W]`` on the CPU. H and W are the size at which the video is
        displayed: rotation metadata is applied, which the released code does not do. An alpha
        channel is dropped, grey is repeated over the three channels, and more than 8 bits are
        rounded to 8 bits.

    If a video is shorter than a view, its last frame is repeated. The same holds for a file that is
    truncated or damaged in the middle: all frames that can be decoded are used. If the size of the
    frames changes inside a video, all frames are scaled to the size of the first frame.

    Raises:
        VideoNotFoundError: the file does not exist.
        VideoError: the path is a folder, the file is empty or has no video stream, or no frame can
            be decoded.
        VideoOptionError: ``sampler`` or ``backend`` is not known, or a number is out of range.
        MissingDependencyError: PyAV is not installed, or ``backend="torchcodec"`` and torchcodec
            cannot be loaded.

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
    """Decode the frames of all windows with PyAV: uint8 ``[V * T, C, H, W]``."""
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
    """Replace each window over the whole stream by one window for each of its frames.

    This is possible if the time stamps of the packets are known. Then frame n is the frame at
    ``stamps[n]``, which a seek can reach.
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
    """Take the frames of one window from a stream: the same frames as ``sampling.select``."""

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
        """Close the window: no further frame belongs to it."""
        for stamp in sorted(self._waiting):
            self._take(self._waiting[stamp])
        self._waiting.clear()
        self.done = True

    @property
    def empty(self) -> bool:
        return self._last is None

    def fall_back(self, frame: av.VideoFrame) -> None:
        """Use a frame for a window that begins after the end of the video."""
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
    """Raised when a seek ends after the requested frame."""


def _collect(stream: Stream, parts: Sequence[_Part]) -> list[_Picker]:
    if stream.seekable and all(part.window.start is not None for part in parts):
        try:
            pickers = [_Picker(part.window) for part in parts]
            _run(stream, pickers, seek=True)
            if not any(picker.empty for picker in pickers):
                return pickers
        except (_SeekMissedError, VideoError):
            pass  # decode from the beginning: slower, but right for every container
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
    """Pass the frames of a stream to the pickers; return the last decoded frame or ``None``."""
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
    """Group the windows that overlap or that are close together; a group is read in one pass."""
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
    """Convert frames to uint8 ``[N, C, H, W]``; each distinct frame is converted only once."""
    # One scaler for all frames: a scaler needs some megabytes.
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
        # NumPy, because PyTorch uses all cores for such a copy and then waits 10 ms if the cores
        # are busy (measured on 2 cores; NumPy needs 0.1 ms for 320x240).
        np.copyto(row, pictures[id(frame)].transpose(2, 0, 1))
    return torch.from_numpy(video)


def _quarter_turns(frame: av.VideoFrame) -> int:
    # FFmpeg gives the counterclockwise rotation, in degrees, that makes the frame upright. PyAV
    # before version 14 does not have this attribute.
    return round(getattr(frame, "rotation", 0) / 90) % 4
