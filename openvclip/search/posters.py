"""Posters and short previews of moments: what a page of results shows without the video file."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any, NamedTuple

from openvclip.errors import VideoError, VideoOptionError
from openvclip.search.moments import Moment
from openvclip.video.excerpts import pictures_at
from openvclip.video.posters import Poster, poster_at, scaled_image

__all__ = ["Poster", "Preview", "moment_poster", "moment_preview", "poster_time", "preview_part"]

_FPS = 12
# Constant quality with a limit for what noise, rain and water cost. 320 pixels need about 20 KB a
# second.
_H264 = {
    "preset": "veryfast",
    "profile": "main",
    "crf": "28",
    "maxrate": "350k",
    "bufsize": "700k",
    "g": str(2 * _FPS),
    "threads": "1",
}
_VP9 = {"deadline": "realtime", "cpu-used": "8", "crf": "36", "b": "350k", "g": str(2 * _FPS)}
# Every browser plays H.264. VP9 is for builds of FFmpeg without an encoder for H.264.
_ENCODERS = (("libx264", "mp4", _H264), ("libvpx-vp9", "webm", _VP9))


class Preview(NamedTuple):
    """A short video of a moment, small and without sound.

    Attributes:
        data: an MP4 file with H.264, or a WebM file with VP9 if PyAV has no encoder for H.264.
        kind: the media type, ``"video/mp4"`` or ``"video/webm"``.
        start: seconds from the first frame of the video.
        end: seconds from the first frame of the video.
    """

    data: bytes
    kind: str
    start: float
    end: float


def moment_poster(moment: Moment, *, width: int = 400) -> Poster:
    """Return a picture of a moment as a JPEG file: the frame at ``moment.peak``.

    Args:
        moment: the moment. If the peak is not between start and end, the frame is the nearest of
            the moment.
        width: the longest side, in pixels. Smaller videos are not enlarged.

    Raises:
        VideoNotFoundError: the video does not exist.
        VideoError: the video can't be read.
        MissingDependencyError: PyAV or Pillow is not installed.
    """
    return poster_at(moment.path, poster_time(moment), width=width)


def poster_time(moment: Moment) -> float:
    """Return the time of the picture of a moment, in seconds: the peak, or the nearest time to it.

    Args:
        moment: the moment.
    """
    return max(0.0, min(max(moment.peak, moment.start), moment.end))


def preview_part(moment: Moment, seconds: float) -> tuple[float, float]:
    """Return start and end of the part of a moment that a preview of some seconds shows.

    If the moment is longer than the preview, the peak is in the middle of the part, or as near to
    the middle as start and end allow.

    Args:
        moment: the moment.
        seconds: the greatest length of the part, in seconds.
    """
    start, end = max(moment.start, 0.0), max(moment.end, 0.0)
    if end - start <= seconds:
        return start, end
    begin = min(max(moment.peak - seconds / 2, start), end - seconds)
    return begin, begin + seconds


def moment_preview(moment: Moment, *, width: int = 320, seconds: float = 8.0) -> Preview:
    """Return a short video of a moment: 12 frames per second, without sound.

    Args:
        moment: the moment; see :func:`preview_part` for the part that is shown.
        width: the longest side, in pixels. Smaller videos are not enlarged.
        seconds: the greatest length of the preview, in seconds.

    Raises:
        VideoNotFoundError: the video does not exist.
        VideoError: the video can't be read, or PyAV has no encoder that browsers can play.
        VideoOptionError: ``seconds`` is not above 0.
        MissingDependencyError: PyAV or Pillow is not installed.
    """
    if not 0 < seconds < 3600:
        raise VideoOptionError(f"seconds={seconds!r}: expected a number above 0 and below 3600.")
    start, end = preview_part(moment, seconds)
    count = max(1, round((end - start) * _FPS))
    pictures = pictures_at(moment.path, [start + number / _FPS for number in range(count)])
    first = next(pictures)
    encoder, container, options = _encoder()
    data = io.BytesIO()
    import av

    with av.open(data, "w", format=container) as output:
        stream: Any = output.add_stream(encoder, rate=_FPS, options=options)
        image = scaled_image(first, width)
        # H.264 with 4:2:0 needs an even width and height.
        size = tuple(max(2, side // 2 * 2) for side in image.size)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        number = 0
        while True:
            frame = av.VideoFrame.from_image(image.resize(size) if image.size != size else image)
            frame.pts, frame.time_base = number, Fraction(1, _FPS)
            output.mux(stream.encode(frame))
            picture = next(pictures, None)
            if picture is None:
                break
            image, number = scaled_image(picture, width), number + 1
        output.mux(stream.encode())
    return Preview(data.getvalue(), f"video/{container}", start, end)


def _encoder() -> tuple[str, str, dict[str, str]]:
    import av

    for name, container, options in _ENCODERS:
        if name in av.codecs_available:
            return name, container, options
    names = " or ".join(name for name, _, _ in _ENCODERS)
    raise VideoError(f"This PyAV has no encoder {names}, so there are no previews.")
