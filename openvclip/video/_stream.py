"""A video file opened with PyAV: its metadata and its frames one after another.

Every error of FFmpeg is converted to :class:`VideoError` in this module.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch.utils.data import get_worker_info

from openvclip.errors import MissingDependencyError, VideoError
from openvclip.video._containers import container_of
from openvclip.video._inputs import EncodedVideo
from openvclip.video._packets import (
    PacketIndex,
    count_packets,
    header_is_right,
    header_rate,
    measured,
    with_count,
)
from openvclip.video.sampling import StreamInfo

if TYPE_CHECKING:
    import av

# The largest number of pixels in a frame; 8K has 33 million pixels. A damaged header can give a
# size that needs more memory than the machine has.
_MAX_PIXELS = 64 * 2**20
# Video streams that a player does not play: cover pictures, thumbnails of chapters, and parts of a
# larger picture.
_PICTURES = ("attached_pic", "timed_thumbnails", "dependent")
_STILL_CODECS = ("mjpeg", "png", "bmp", "webp", "tiff")

__all__ = [
    "PacketIndex",
    "Stream",
    "decoder_errors",
    "index_packets",
    "nothing_decoded",
    "open_container",
    "require_av",
    "with_count",
]


def nothing_decoded(name: str) -> VideoError:
    """Return the error of a video without a frame that can be decoded."""
    return VideoError(f"{name}: decoded 0 frames; the file is truncated, damaged or no video.")


def require_av() -> Any:
    """Import PyAV at its first use and return the module."""
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            "PyAV is not installed, but it is needed to read video files. Install it with: pip "
            'install "openvclip[video]"'
        ) from error
    return av


def _failures() -> tuple[type[Exception], ...]:
    # A damaged header also causes plain Python errors in PyAV: a rate of 0 / 0, an impossible pixel
    # format, a time stamp beyond 64 bits.
    python = (OSError, ValueError, ArithmeticError, RuntimeError, LookupError, MemoryError)
    return (require_av().error.FFmpegError, *python)


@contextmanager
def decoder_errors(path: str) -> Iterator[None]:
    """Convert the errors of FFmpeg and PyAV to :class:`VideoError`."""
    try:
        yield
    except VideoError:
        raise
    except _failures() as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(
            f"{path}: cannot be read as a video: FFmpeg says {reason!r}. Play it with ffplay, or "
            "copy or download it again."
        ) from error


class Stream:
    """The video stream of a file that a player shows. A context manager; not thread-safe.

    Of several video streams, FFmpeg's choice is taken. Cover pictures and thumbnails are no video.

    Args:
        video: the absolute path of the file, or another input.

    Attributes:
        video: the input.
        path: name of the video for error texts; for a file its absolute path.
        header: the metadata that the container gives; ``frames`` can be ``None`` or wrong.
        position: time stamp of the last decoded frame, in ticks.
        message: the first error of FFmpeg that did not end the decoding, or ``""``.
    """

    def __init__(self, video: str | EncodedVideo) -> None:
        self.video = EncodedVideo(video, video) if isinstance(video, str) else video
        self.path = path = self.video.name
        with decoder_errors(path):
            self._container = open_container(self.video)
        try:
            with decoder_errors(path):
                self._stream = _video_stream(self._container, path, self.video.alone)
                self.header = _stream_info(self._stream)
        except BaseException:
            self._container.close()
            raise
        self._frames: Generator[tuple[int, av.VideoFrame], None, None] | None = None
        self.position = self.header.start
        self.message = ""

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._frames is not None:
            self._frames.close()
        self._container.close()

    @cached_property
    def info(self) -> StreamInfo:
        """The metadata of the frames that are shown; ``frames`` can be ``None``.

        If the container does not count these frames, the packets are read once.
        """
        header, container = self.header, container_of(self._container.format.name)
        # The header of a fragmented MP4 can count no frame, although the file has a duration.
        expected = header.timed or container.counts == "index"
        if not expected or (header.timed and header_is_right(self._stream, container, header)):
            return header
        return measured(header, self.packets, self.time_base)

    @cached_property
    def packets(self) -> PacketIndex:
        """The frames that the packets contain. The first access reads the whole file once."""
        return index_packets(self.video)

    @property
    def index(self) -> int:
        """The number of the stream in the file."""
        return int(self._stream.index)

    @property
    def seekable(self) -> bool:
        """Whether a seek leaves the time stamps of the frames unchanged."""
        return container_of(self._container.format.name).seekable

    @property
    def in_order(self) -> bool:
        """Whether the time stamps of the packets are the time stamps of the frames."""
        return self.seekable or not self._stream.codec_context.has_b_frames

    @property
    def container(self) -> str:
        """FFmpeg's names of the container, separated by commas."""
        return str(self._container.format.name)

    @property
    def codec(self) -> str:
        """FFmpeg's name of the codec."""
        return str(self._stream.codec_context.codec.canonical_name)

    @property
    def pixel_format(self) -> str:
        """FFmpeg's name of the pixel format, or ``""``."""
        return str(self._stream.codec_context.pix_fmt or "")

    @property
    def pixel_ratio(self) -> float:
        """Width of a pixel on a screen divided by its height."""
        ratio = self._stream.sample_aspect_ratio or self._stream.codec_context.sample_aspect_ratio
        return float(ratio) if ratio and 0.1 <= ratio <= 10 else 1.0

    def ticks(self, seconds: float) -> int:
        """Convert seconds to ticks of the stream; return at least 1."""
        base = self.time_base
        return max(1, round(seconds / float(base))) if base else 1

    @property
    def time_base(self) -> Fraction | None:
        """Length of a tick in seconds."""
        base: Fraction | None = self._stream.time_base
        return base

    @property
    def seconds(self) -> float | None:
        """Duration of the stream, ``None`` if the container does not give it."""
        base, duration = self.time_base, self.info.duration
        return float(duration * base) if base and duration else None

    @property
    def stated_seconds(self) -> float | None:
        """Length of the video that the file states, also if its end is missing, or ``None``."""
        if self.header.duration and self.time_base:
            return float(self.header.duration * self.time_base)
        tag = str(self._stream.metadata.get("DURATION", ""))  # of Matroska
        clock = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", tag)
        return 3600 * int(clock[1]) + 60 * int(clock[2]) + float(clock[3]) if clock else None

    def seconds_at(self, stamp: int) -> float:
        """Convert a time stamp to seconds from the first frame."""
        base = self.time_base
        return float((stamp - self.header.start) * (base or 0))

    def seek(self, stamp: int) -> None:
        """Seek to the key frame before a time stamp.

        In some containers the key frame is found by decoding time. It can then be after the time
        stamp.
        """
        if self._frames is not None:
            self._frames.close()
            self._frames = None
        with decoder_errors(self.path):
            self._container.seek(stamp, backward=True, any_frame=False, stream=self._stream)

    def frames(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """Return the iterator over ``(time stamp, frame)``. Only a seek starts a new iterator."""
        if self._frames is None:
            self._frames = self._decode()
        return self._frames

    def _decode(self) -> Generator[tuple[int, av.VideoFrame], None, None]:
        step = _tick(self.header)
        following = self.header.start
        for packet in self._packets():
            for frame in self._decode_packet(packet):
                # Frames of raw streams have no time stamps: continue from the previous frame.
                stamp = following if frame.pts is None else int(frame.pts)
                following = stamp + step
                self.position = stamp
                yield stamp, frame

    def _packets(self) -> Iterator[av.Packet]:
        packets = iter(self._container.demux(self._stream))
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                self.video.require_read()
                return
            except _failures() as error:
                self.video.require_read()
                # The file is truncated, and the generator has ended. An empty packet makes the
                # decoder return its last frames.
                self._note(error)
                yield self._flush_packet()
                return
            yield packet

    def _flush_packet(self) -> av.Packet:
        packet = require_av().Packet(0)
        packet.stream = self._stream
        return packet

    def _decode_packet(self, packet: av.Packet) -> list[Any]:
        try:
            frames: list[Any] = list(packet.decode())
        except _failures() as error:
            # The frames of a damaged packet are lost, but not the rest of the video.
            self._note(error)
            return []
        for frame in frames:
            if frame.width * frame.height > _MAX_PIXELS:
                raise _too_large(self.path, frame.width, frame.height)
        return frames

    def _note(self, error: Exception) -> None:
        self.message = self.message or getattr(error, "strerror", None) or str(error)


def index_packets(video: str | EncodedVideo) -> PacketIndex:
    """Count the frames of a stream by its packets, without decoding."""
    with Stream(video) as stream:
        return count_packets(stream._packets())


def open_container(video: EncodedVideo) -> Any:
    """Return a container that PyAV has opened for reading."""
    av = require_av()
    # A media file can name other files and addresses. Only the file itself is read.
    protocol = "file" if isinstance(video.data, str) else "none"
    options = {**video.options, "protocol_whitelist": protocol}
    try:
        # Titles in old encodings are common. Titles are not used.
        return av.open(
            video.opened(), format=video.format, metadata_errors="ignore", options=options
        )
    except TypeError:  # PyAV 19 accepts every encoding and has removed the argument
        return av.open(video.opened(), format=video.format, options=options)


def _video_stream(container: Any, path: str, alone: bool) -> Any:
    names = container.format.name
    if container_of(names).refused:
        raise VideoError(f"{path}: is not a video file (FFmpeg takes it for {names!r}).")
    stream = _choose(container)
    if stream is None:
        kinds = ", ".join(map(_kind, container.streams)) or "no stream at all"
        raise VideoError(f"{path}: has no video stream (found: {kinds}).")
    context = stream.codec_context
    if context is None:
        raise VideoError(f"{path}: this FFmpeg has no decoder for its video stream.")
    if context.width * context.height > _MAX_PIXELS:
        raise _too_large(path, context.width, context.height)
    # The workers of a DataLoader already use all cores. If each worker had a decoder with one
    # thread for each core, the threads would wait for each other.
    if get_worker_info() is not None or not alone:
        context.thread_count = 1
    else:
        context.thread_type = "AUTO"
    return stream


def _choose(container: Any) -> Any:
    """Return the video stream that a player shows, or ``None``."""
    streams = container.streams.video
    videos = [stream for stream in streams if not _is_picture(stream)]
    # The picture of a thumbnail track is not marked; it is a single picture beside a film.
    videos = [stream for stream in videos if not _is_still(stream)] or videos
    if len(streams) < 2 or not videos:
        return videos[0] if videos else None
    best = container.streams.best("video")
    # FFmpeg prefers the default stream of the file, which can be a picture.
    return best if best in videos else max(videos, key=_area)


def _area(stream: Any) -> int:
    context = stream.codec_context
    return 0 if context is None else int(context.width * context.height)


def _is_picture(stream: Any) -> bool:
    flags = type(stream.disposition)
    # An older PyAV does not know every flag.
    return any(stream.disposition & getattr(flags, name, 0) for name in _PICTURES)


def _is_still(stream: Any) -> bool:
    context = stream.codec_context
    return stream.frames == 1 or (
        not stream.frames and context is not None and context.name in _STILL_CODECS
    )


def _kind(stream: Any) -> str:
    return "picture" if stream.type == "video" else str(stream.type)


def _stream_info(stream: Any) -> StreamInfo:
    frames, duration = stream.frames, stream.duration
    return StreamInfo(
        fps=header_rate(stream),
        frames=int(frames) if frames and frames > 0 else None,
        duration=int(duration) if duration and duration > 0 else None,
        start=int(stream.start_time or 0),
    )


def _tick(info: StreamInfo) -> int:
    if info.frames and info.duration:
        return max(1, info.duration // info.frames)
    return 1


def _too_large(path: str, width: int, height: int) -> VideoError:
    return VideoError(
        f"{path}: frames of {width}x{height} pixels; at most {_MAX_PIXELS} pixels are read. The "
        "header is probably damaged."
    )
