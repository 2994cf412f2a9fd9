"""Videos whose frames are reached by their numbers: arrays of frames, and torchcodec's decoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openvclip.errors import VideoError, VideoOptionError
from openvclip.video._layout import channel_axis, channels_first
from openvclip.video.sampling import StreamInfo

__all__ = ["DecoderVideo", "FrameArray", "NumberedVideo", "RateChangesError"]

# Ticks in a frame. FFmpeg writes MP4 files of 30 frames per second with the same number, so the
# windows begin at the same frames.
_TICK = 512
# A frame whose time is this far from that of a constant rate, in frames, tells of a changing rate.
_SHIFTED = 0.25
_CHUNK = 16  # frames that are decoded at a time


class RateChangesError(Exception):
    """Raised when frames were chosen for a constant rate, and the rate of the video changes."""


class NumberedVideo(ABC):
    """A video whose frames can be read in any order, by their numbers.

    Attributes:
        name: name of the video for error texts.
        count: number of frames.
        fps: frames per second, or ``None`` if it is not known.
    """

    name: str
    count: int
    fps: float | None

    @abstractmethod
    def take(self, numbers: Sequence[int], *, timed: bool = False) -> Tensor:
        """Return frames by their numbers, which increase: uint8 ``[N, 3, H, W]`` on the CPU.

        Args:
            numbers: the numbers of the frames.
            timed: whether the frames were chosen by time.

        Raises:
            RateChangesError: the frames were chosen by time, and do not have these times.
        """

    @abstractmethod
    def measure(self) -> None:
        """Measure the time of each frame, so that ``stamps`` are exact."""

    @abstractmethod
    def displayed(self) -> Iterator[tuple[float, Callable[[], Tensor]]]:
        """Yield the time at which each frame disappears, and a function that returns the frame.

        The time is in seconds from the first frame. The frame is uint8 ``[1, 3, H, W]``.
        """

    @property
    def info(self) -> StreamInfo:
        """The metadata for :func:`openvclip.video.sampling.plan`."""
        return StreamInfo(self.fps or 1.0, self.count, self.count * _TICK)

    @property
    def stamps(self) -> Sequence[int]:
        """The time stamp of each frame, in the ticks of ``info``."""
        return range(0, self.count * _TICK, _TICK)

    def require_rate(self, purpose: str) -> float:
        """Return the frames per second, or raise :class:`VideoOptionError` if unknown."""
        if self.fps is None:
            raise VideoOptionError(
                f"{self.name}: the frame rate is not known, and {purpose} needs it. Give fps=, or "
                "VideoFrames(frames, fps). The sampler 'uniform' needs no frame rate."
            )
        return self.fps


class FrameArray(NumberedVideo):
    """An array of frames with a constant rate.

    Args:
        frames: uint8 frames, ``[T, H, W, C]`` or ``[T, C, H, W]``.
        axis: the axis of the channels, 1 or 3.
        fps: frames per second, or ``None``.
        name: name of the video for error texts.
    """

    def __init__(self, frames: Any, axis: int, fps: float | None, name: str) -> None:
        self._frames, self._axis = frames, axis
        self.name, self.fps, self.count = name, fps, len(frames)

    def take(self, numbers: Sequence[int], *, timed: bool = False) -> Tensor:
        if isinstance(self._frames, Tensor):
            rows = self._frames[torch.tensor(numbers, device=self._frames.device)].cpu()
        else:
            # Only the frames of the clip are copied. PyTorch needs a copy of arrays that are
            # read-only or have negative strides.
            rows = torch.from_numpy(np.array(self._frames[list(numbers)]))
        return channels_first(rows, self._axis)

    def measure(self) -> None:
        """Do nothing: the rate is constant."""

    def displayed(self) -> Iterator[tuple[float, Callable[[], Tensor]]]:
        fps = self.require_rate("a timeline")
        for number in range(self.count):
            yield (number + 1) / fps, partial(self.take, [number])


class DecoderVideo(NumberedVideo):
    """An open ``VideoDecoder`` of torchcodec.

    Args:
        decoder: the decoder, with frames in either order of the dimensions.
        name: name of the video for error texts.

    Raises:
        VideoError: the decoder has no frames, or gives no frame rate.
    """

    def __init__(self, decoder: Any, name: str) -> None:
        self._decoder, self.name = decoder, name
        with self._errors():
            self.count = len(decoder)
            fps = decoder.metadata.average_fps
            self._begin = float(decoder.metadata.begin_stream_seconds or 0.0)
        if not self.count or not fps:
            raise VideoError(
                f"{name}: the decoder gives {self.count} frames and a rate of {fps}; expected at "
                "least one frame and a rate. Pass the file instead of the decoder."
            )
        self.fps: float = float(fps)
        self._times: list[float] | None = None

    @property
    def info(self) -> StreamInfo:
        end = self._decoder.metadata.end_stream_seconds
        if self._times is None or end is None:
            return super().info
        return StreamInfo(self.fps, self.count, self._ticks(float(end)))

    @property
    def stamps(self) -> Sequence[int]:
        return super().stamps if self._times is None else [self._ticks(t) for t in self._times]

    def measure(self) -> None:
        """Read the time of each frame, for a video whose rate changes.

        torchcodec gives the times together with the frames, so this decodes the whole video.
        """
        starts = range(0, self.count, _CHUNK)
        self._times = [t for i in starts for t in self._chunk(i).pts_seconds.tolist()]

    def take(self, numbers: Sequence[int], *, timed: bool = False) -> Tensor:
        batch = self._batch(numbers)
        if timed and self._times is None:
            times = zip(numbers, batch.pts_seconds.tolist(), strict=True)
            if any(abs((t - self._begin) * self.fps - n) > _SHIFTED for n, t in times):
                raise RateChangesError
        return self._pixels(batch)

    def displayed(self) -> Iterator[tuple[float, Callable[[], Tensor]]]:
        until = 0.0
        before: Callable[[], Tensor] | None = None
        for start in range(0, self.count, _CHUNK):
            chunk = self._chunk(start)
            for time, frame in zip(chunk.pts_seconds.tolist(), self._pixels(chunk), strict=True):
                if before is not None:
                    until = max(time - self._begin, until)
                    yield until, before
                before = partial(torch.unsqueeze, frame, 0)
        if before is not None:
            yield until + 1 / self.fps, before

    def _ticks(self, seconds: float) -> int:
        return round((seconds - self._begin) * self.fps * _TICK)

    def _pixels(self, batch: Any) -> Tensor:
        return channels_first(batch.data.cpu(), channel_axis(batch.data, self.name))

    def _batch(self, numbers: Sequence[int]) -> Any:
        with self._errors():
            return self._decoder.get_frames_at(list(numbers))

    def _chunk(self, start: int) -> Any:
        with self._errors():
            return self._decoder.get_frames_in_range(start, min(start + _CHUNK, self.count))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise VideoError(
                f"{self.name}: torchcodec can't decode it ({reason}). Pass the file instead of the "
                "decoder."
            ) from error
