"""Cut a part of a video to a file of its own, exactly from one time to another."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from openvclip.errors import VideoError, VideoOptionError
from openvclip.video._inputs import EncodedVideo
from openvclip.video._stream import (
    Stream,
    decoder_errors,
    nothing_decoded,
    open_container,
    require_av,
)
from openvclip.video.excerpts import ShownPicture, pictures_at
from openvclip.video.sources import VideoSource, file_name, opened_file, source_name

if TYPE_CHECKING:
    import av

__all__ = ["cut_video"]

_FASTEST = 240.0  # frames per second
_X264 = {"crf": "18", "preset": "veryfast", "bf": "0"}  # no B-frames, so that the file begins at 0
# Every player plays H.264. MPEG-4 is for builds of FFmpeg without an encoder for H.264.
_ENCODERS = (("libx264", _X264), ("mpeg4", {"qscale": "2"}))
_BT709 = 1  # FFmpeg's number of the usual colours of videos
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
_LEAD = 1.0  # seconds of sound that are decoded before the start


def cut_video(
    video: VideoSource, path: str | os.PathLike[str], start: float, end: float
) -> tuple[float, float]:
    """Write a part of a video to an MP4 file, with its sound.

    The pictures are encoded again, because a copy of the packets could only begin at a key frame.
    The file has the frame rate of the video and shows at each time the picture that the video shows
    at this time. The pictures are upright and have the usual range of brightness.

    Args:
        video: a video file, or another source that FFmpeg decodes; see
            :data:`openvclip.video.VideoSource`.
        path: the file to write. An existing file is replaced. It must not be the video itself.
        start: seconds from the first frame of the video.
        end: seconds from the first frame of the video. A later end than that of the video is the
            end of the video.

    Returns:
        Start and end of the part, in seconds. They are whole numbers of frames apart.

    Raises:
        VideoNotFoundError: the video does not exist.
        VideoError: the video can't be read, ``start`` is after its end, or PyAV has no encoder.
        VideoOptionError: the times are negative, not finite or in the wrong order; or ``video`` is
            an array of frames or a decoder; or ``path`` is the video itself.
        OSError: the file can't be written.
        MissingDependencyError: PyAV is not installed.
    """
    if not 0 <= start < end < math.inf:
        raise VideoOptionError(
            f"start={start!r}, end={end!r}: expected seconds from the first frame of the video, "
            "and an end after the start."
        )
    av = require_av()
    with opened_file(video) as source:
        is_file = isinstance(source.data, str) and os.path.exists(path)
        if is_file and os.path.samefile(str(source.data), path):
            raise VideoOptionError(
                f"path={os.fspath(path)!r} is the video itself, which is read while the part is "
                "written. Give another path."
            )
        fps, length, origin = _facts(source)
        if start >= length:
            raise VideoError(
                f"{source.name}: the part begins at {start:g} s, but the video has {length:.1f} s."
            )
        count = max(1, math.floor(min(end - start, length - start) * fps + 0.5))
        pictures = pictures_at(video, [start + number / float(fps) for number in range(count)])
        seconds = count / float(fps)
        with av.open(os.fspath(path), "w", format="mp4") as output:
            # Both streams are added before the first packet is written.
            first = next(pictures)
            stream = _video_stream(output, first, fps)
            sound = _Sound.of(source, output, origin + start, seconds)
            for number, picture in enumerate(_with_first(first, pictures)):
                output.mux(stream.encode(_frame(picture, stream, number, fps)))
            output.mux(stream.encode())
            if sound is not None:
                sound.write(output)
    return start, start + seconds


def _facts(source: EncodedVideo) -> tuple[Fraction, float, float]:
    """Return frames per second, seconds, and the time of the first frame in the container."""
    with Stream(source) as stream:
        first = next(iter(stream.frames()), None)
        if first is None:
            raise nothing_decoded(source.name)
        rate = stream.info.fps
        fps = Fraction(rate).limit_denominator(1001) if 1 <= rate <= _FASTEST else Fraction(30)
        base, packets = stream.time_base, stream.packets
        length = math.inf
        if base and packets.start is not None and packets.end is not None:
            length = float((packets.end - packets.start) * base)
        return fps, max(length, 1 / float(fps)), float(first[0] * (base or 0))


def _with_first(first: ShownPicture, others: Iterator[ShownPicture]) -> Iterator[ShownPicture]:
    yield first
    yield from others


def _video_stream(output: Any, picture: ShownPicture, fps: Fraction) -> Any:
    av = require_av()
    known = [encoder for encoder in _ENCODERS if encoder[0] in av.codecs_available]
    if not known:
        names = " or ".join(name for name, _ in _ENCODERS)
        raise VideoError(f"This PyAV has no encoder {names}, so videos can't be cut.")
    name, options = known[0]
    stream = output.add_stream(name, rate=fps, options=options)
    height, width = picture.pixels.shape[:2]
    context = stream.codec_context
    # Encoders need an even width and height.
    context.width, context.height = max(2, width // 2 * 2), max(2, height // 2 * 2)
    context.pix_fmt = "yuv420p"
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    ratio = Fraction(picture.aspect * height / width).limit_denominator(100)
    if ratio != 1:
        context.sample_aspect_ratio = ratio
    return stream


def _frame(picture: ShownPicture, stream: Any, number: int, fps: Fraction) -> Any:
    av = require_av()
    height, width = stream.codec_context.height, stream.codec_context.width
    pixels = picture.pixels[:height, :width]
    if pixels.shape[:2] != (height, width):  # a video of one row or column
        pixels = np.resize(pixels, (height, width, 3))
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
    frame.pts, frame.time_base = number, 1 / fps
    return frame


class _Sound:
    """The sound of a part of a video, decoded and cut to the sample."""

    def __init__(self, output: Any, samples: np.ndarray[Any, Any], rate: int) -> None:
        self._samples, self._rate = samples, rate
        self._layout = "mono" if len(samples) == 1 else "stereo"
        self._stream = output.add_stream("aac", rate=rate, layout=self._layout)

    @classmethod
    def of(cls, source: EncodedVideo, output: Any, start: float, seconds: float) -> _Sound | None:
        """Return the sound from a time of the container on; ``None`` if there is none.

        A sound that can't be decoded is left out: the pictures are what was searched for.
        """
        av = require_av()
        if "aac" not in av.codecs_available:
            return None
        try:
            with decoder_errors(source.name), open_container(source) as container:
                stream = container.streams.best("audio")
                if stream is None or stream.codec_context is None:
                    return None
                rate = stream.codec_context.sample_rate
                rate = rate if rate in _AAC_RATES else 48000
                layout = "mono" if stream.codec_context.channels == 1 else "stereo"
                container.seek(max(0, int((start - _LEAD) * av.time_base)), backward=True)
                resampler = av.AudioResampler("fltp", layout, rate)
                samples = np.zeros((1 if layout == "mono" else 2, round(seconds * rate)), "float32")
                if not _decode_sound(container.decode(stream), resampler, samples, start, rate):
                    return None
        except VideoError:
            return None
        return cls(output, samples, rate)

    def write(self, output: Any) -> None:
        """Encode the samples."""
        av = require_av()
        size = 1024
        for begin in range(0, self._samples.shape[1], size):
            part = np.ascontiguousarray(self._samples[:, begin : begin + size])
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=self._layout)
            frame.sample_rate, frame.pts = self._rate, begin
            frame.time_base = Fraction(1, self._rate)
            output.mux(self._stream.encode(frame))
        output.mux(self._stream.encode())


def _decode_sound(
    frames: Iterator[av.AudioFrame],
    resampler: Any,
    samples: np.ndarray[Any, Any],
    start: float,
    rate: int,
) -> bool:
    """Write the samples from a time on into ``samples``; return whether there were any."""
    begun = False
    place: int | None = None  # of the next sample
    for decoded in frames:
        if place is None:
            if decoded.time is None:
                continue
            place = round((decoded.time - start) * rate)
        for frame in resampler.resample(decoded):
            values = frame.to_ndarray()
            first, last = max(place, 0), min(place + values.shape[1], samples.shape[1])
            if first < last:
                samples[:, first:last] = values[:, first - place : last - place]
                begun = True
            place += values.shape[1]
        if place >= samples.shape[1]:
            break
    return begun


def part_name(video: object, start: float, end: float) -> str:
    """Return the name of a file for a part of a video, such as ``"match 0012.0-0016.5.mp4"``.

    Args:
        video: the video.
        start: seconds from the first frame of the video.
        end: seconds from the first frame of the video.
    """
    stem = os.path.splitext(file_name(source_name(video)))[0]
    kept = "".join(letter if letter.isalnum() or letter in " -_." else "_" for letter in stem)
    return f"{kept[:80].strip(' .') or 'video'} {start:06.1f}-{end:06.1f}.mp4"
