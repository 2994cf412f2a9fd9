"""Read the pictures that a player shows at some times of a video, without decoding all of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from openvclip.errors import VideoError, VideoOptionError
from openvclip.video._inputs import EncodedVideo
from openvclip.video._pictures import Pictures
from openvclip.video._reading import SEEK_MARGIN, WORTH_A_SEEK
from openvclip.video._stream import Stream, nothing_decoded
from openvclip.video._windows import SeekMissedError, in_display_order
from openvclip.video.sources import VideoSource, opened_file

if TYPE_CHECKING:
    import av

__all__ = ["ShownPicture", "StreamFacts", "pictures_at", "stream_facts"]

_ROUNDING = 1e-3  # seconds; Matroska keeps times in milliseconds


class ShownPicture(NamedTuple):
    """A picture of a video.

    Attributes:
        seconds: the time for which the picture was requested, from the first frame of the video.
        pixels: the upright picture, uint8 RGB ``[H, W, 3]``.
        aspect: width of the picture on a screen divided by its height. It is not W / H if the
            pixels of the video are not square.
    """

    seconds: float
    pixels: np.ndarray[Any, Any]
    aspect: float


class StreamFacts(NamedTuple):
    """What a player needs to know about a video file.

    Attributes:
        container: FFmpeg's names of the container, such as ``"mov,mp4,m4a,3gp,3g2,mj2"``.
        codec: FFmpeg's name of the codec, such as ``"h264"``.
        pixel_format: FFmpeg's name of the pixel format, such as ``"yuv420p"``.
        seconds: duration of the video, ``None`` if it is not known.
    """

    container: str
    codec: str
    pixel_format: str
    seconds: float | None


def pictures_at(video: VideoSource, times: Sequence[float]) -> Iterator[ShownPicture]:
    """Iterate over the pictures that a player shows at some times.

    The reader seeks to the first time and decodes from there to the last time. If a time is after
    the end of the video, the picture is the last frame.

    Args:
        video: a video file, or another source that FFmpeg decodes; see
            :data:`openvclip.video.VideoSource`.
        times: seconds from the first frame of the video, in ascending order.

    Yields:
        A :class:`ShownPicture` for each time.

    Raises:
        VideoNotFoundError: the file does not exist.
        VideoError: the video can't be read, or no frame can be decoded.
        VideoOptionError: ``times`` is empty or not in ascending order, or a time is below 0 or not
            finite; or ``video`` is an array of frames or a decoder.
        MissingDependencyError: PyAV is not installed.
    """
    wanted = [float(time) for time in times]
    if not wanted or wanted != sorted(wanted) or not all(0 <= t < math.inf for t in wanted):
        raise VideoOptionError(
            f"times={wanted[:10]!r}: expected seconds of at least 0 in ascending order."
        )
    with opened_file(video, alone=False) as source:
        begun = False
        if wanted[0] > WORTH_A_SEEK:
            # If the seek fails before the first picture, the file is decoded from its beginning.
            try:
                for picture in _pictures(source, wanted, seek=True):
                    begun = True
                    yield picture
                return
            except (SeekMissedError, VideoError):
                if begun:
                    raise
        yield from _pictures(source, wanted, seek=False)


def _pictures(source: EncodedVideo, times: list[float], seek: bool) -> Iterator[ShownPicture]:
    pictures = Pictures(source.name)
    with Stream(source) as stream:
        ratio = stream.pixel_ratio

        def shown(time: float, frame: av.VideoFrame) -> ShownPicture:
            pixels = pictures(frame)
            height, width = pixels.shape[:2]
            # Quarter turns exchange the sides, and the pixels turn with them.
            turned = width != frame.width and width == frame.height
            return ShownPicture(time, pixels, width / height * (1 / ratio if turned else ratio))

        frames = in_display_order(stream)
        origin: float | None = None
        if seek:
            first = next(iter(frames), None)
            if first is None:
                raise SeekMissedError
            origin = stream.seconds_at(first[0])
            del first
            stream.seek(stream.header.start + stream.ticks(origin + times[0] - SEEK_MARGIN))
            frames = in_display_order(stream)
        before: av.VideoFrame | None = None
        todo = list(times)
        latest = -math.inf
        for stamp, frame in frames:
            seconds = stream.seconds_at(stamp)
            origin = seconds if origin is None else origin
            # Time stamps of damaged files can jump backwards.
            latest = max(seconds - origin, latest)
            if before is None and seek and latest > times[0] + _ROUNDING:
                raise SeekMissedError
            while todo and before is not None and todo[0] + _ROUNDING < latest:
                yield shown(todo.pop(0), before)
            if not todo:
                return
            before = frame
        if before is None:
            raise nothing_decoded(source.name)
        for time in todo:
            yield shown(time, before)


def stream_facts(video: VideoSource, *, measured: bool = False) -> StreamFacts:
    """Return the codec, the container and the duration of a video.

    Args:
        video: see :func:`pictures_at`.
        measured: compute the duration from the packets, which reads the whole file once. A wrong
            header then has no effect. Default: the duration that the container gives.

    Raises:
        VideoNotFoundError, VideoError, VideoOptionError, MissingDependencyError: see
            :func:`pictures_at`.
    """
    with opened_file(video, alone=False) as source, Stream(source) as stream:
        base, length = stream.time_base, stream.header.duration
        if measured:
            start, end = stream.packets.start, stream.packets.end
            length = None if start is None or end is None else end - start
        seconds = float(length * base) if length is not None and base else None
        return StreamFacts(stream.container, stream.codec, stream.pixel_format, seconds)
