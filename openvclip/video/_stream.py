"""A video file opened with PyAV: its metadata and its frames one after another.

Every error of FFmpeg is converted to :class:`VideoError` in this module.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch.utils.data import get_worker_info

from openvclip.errors import MissingDependencyError, VideoError, VideoNotFoundError
from openvclip.video._containers import container_of
from openvclip.video.sampling import StreamInfo

if TYPE_CHECKING:
    import av

# The largest number of pixels in a frame; 8K has 33 million pixels. A damaged header can give a
# size that needs more memory than the machine has.
_MAX_PIXELS = 64 * 2**20
_DEFAULT_FPS = 30.0


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


def check_path(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of a readable, non-empty file.

    Raises:
        VideoNotFoundError: the file does not exist.
        VideoError: the path is no regular file, or the file is empty or cannot be opened.
    """
    name = os.fspath(path)
    # FFmpeg reads "a:" at the beginning of a relative path as a protocol. An absolute path avoids
    # this.
    full = os.path.abspath(name)
    if os.path.isdir(full):
        raise VideoError(f"{name}: is a directory; expected a video file.")
    try:
        size = os.stat(full).st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoNotFoundError(
            f"{name}: no such file. Check the path, and the folder to which it is relative."
        ) from error
    except (OSError, ValueError) as error:
        raise VideoError(f"{name}: cannot be opened ({error}).") from error
    if not os.path.isfile(full):
        raise VideoError(f"{name}: is not a regular file; expected a video file.")
    if size == 0:
        raise VideoError(f"{name}: the file is empty (0 bytes). Copy or download it again.")
    try:
        with open(full, "rb"):
            return full
    except PermissionError as error:
        raise VideoError(
            f"{name}: no permission to read it; change the file's mode or owner."
        ) from error
    except OSError as error:
        raise VideoError(f"{name}: cannot be opened ({error}).") from error


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


@dataclass(frozen=True)
class PacketIndex:
    """The result of a pass over the packets of a stream, without decoding.

    Attributes:
        count: number of packets that contain a frame.
        stamps: presentation times of these packets in ticks, in increasing order. ``None`` if a
            packet has no presentation time or if two packets have the same presentation time.
    """

    count: int
    stamps: tuple[int, ...] | None


class Stream:
    """The first video stream of a file. A context manager; not thread-safe.

    Args:
        path: the absolute path of the file.
        alone: whether this process is the only process that decodes videos. If not, the decoder
            uses one thread.

    Attributes:
        path: the absolute path of the file.
        position: time stamp of the last decoded frame, in ticks.
        message: the first error of FFmpeg that did not end the decoding, or ``""``.
    """

    def __init__(self, path: str, *, alone: bool = True) -> None:
        self.path = path
        with decoder_errors(path):
            self._container = _open(path)
        try:
            with decoder_errors(path):
                self._stream = _video_stream(self._container, path, alone)
                self._base = _stream_info(self._stream)
        except BaseException:
            self._container.close()
            raise
        self._frames: Generator[tuple[int, av.VideoFrame], None, None] | None = None
        self.position = self._base.start
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

    @property
    def info(self) -> StreamInfo:
        """The metadata of the stream; ``frames`` can be ``None``."""
        return self._base

    @property
    def seekable(self) -> bool:
        """Whether a seek leaves the time stamps of the frames unchanged."""
        return container_of(self._container.format.name).seekable

    @property
    def in_order(self) -> bool:
        """Whether the time stamps of the packets are the time stamps of the frames."""
        return self.seekable or not self._stream.codec_context.has_b_frames

    def ticks(self, seconds: float) -> int:
        """Convert seconds to ticks of the stream; return at least 1."""
        base = self._stream.time_base
        return max(1, round(seconds / float(base))) if base else 1

    @property
    def seconds(self) -> float | None:
        """Duration of the stream according to the container, ``None`` if unknown."""
        base, duration = self._stream.time_base, self._base.duration
        return float(duration * base) if base and duration else None

    def seconds_at(self, stamp: int) -> float:
        """Convert a time stamp to seconds from the first frame."""
        base = self._stream.time_base
        return float((stamp - self._base.start) * (base or 0))

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
        step = _tick(self._base)
        following = self._base.start
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
                return
            except _failures() as error:
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


def index_packets(path: str) -> PacketIndex:
    """Count the frames of a stream by its packets, without decoding."""
    stamps: list[int | None] = []
    with Stream(path) as stream:
        for packet in stream._packets():
            if packet.size and not packet.is_discard:
                stamps.append(packet.pts)
    known = sorted(stamp for stamp in stamps if stamp is not None)
    complete = len(known) == len(stamps) and len(set(known)) == len(known)
    return PacketIndex(len(stamps), tuple(known) if complete else None)


def with_count(info: StreamInfo, count: int) -> StreamInfo:
    """Return the metadata with a number of frames that was counted from the packets."""
    return replace(info, frames=count, counted=True)


def _open(path: str) -> Any:
    av = require_av()
    # A media file can name other files and addresses. Only the file itself is read.
    options = {"protocol_whitelist": "file"}
    try:
        # Titles in old encodings are common. Titles are not used.
        return av.open(path, metadata_errors="ignore", options=options)
    except TypeError:  # PyAV 19 accepts every encoding and has removed the argument
        return av.open(path, options=options)


def _video_stream(container: Any, path: str, alone: bool) -> Any:
    names = container.format.name
    if container_of(names).refused:
        raise VideoError(f"{path}: is not a video file (FFmpeg takes it for {names!r}).")
    if not container.streams.video:
        kinds = ", ".join(stream.type for stream in container.streams) or "no stream at all"
        raise VideoError(f"{path}: has no video stream (found: {kinds}).")
    stream = container.streams.video[0]
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


def _stream_info(stream: Any) -> StreamInfo:
    frames, duration = stream.frames, stream.duration
    return StreamInfo(
        fps=_rate(stream),
        frames=int(frames) if frames and frames > 0 else None,
        duration=int(duration) if duration and duration > 0 else None,
        start=int(stream.start_time or 0),
    )


def _rate(stream: Any) -> float:
    for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate):
        if rate and rate > 0 and math.isfinite(float(rate)):
            return float(rate)
    return _DEFAULT_FPS


def _tick(info: StreamInfo) -> int:
    if info.frames and info.duration:
        return max(1, info.duration // info.frames)
    return 1


def _too_large(path: str, width: int, height: int) -> VideoError:
    return VideoError(
        f"{path}: frames of {width}x{height} pixels; at most {_MAX_PIXELS} pixels are read. The "
        "header is probably damaged."
    )
