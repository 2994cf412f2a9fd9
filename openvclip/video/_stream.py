"""One video file opened with PyAV: what it says about itself, and its frames one after another.

Everything that FFmpeg can throw at a caller is turned into :class:`VideoError` here.
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
from openvclip.video.sampling import StreamInfo

if TYPE_CHECKING:
    import av

# Containers whose packets carry presentation times of their own. In AVI they are reconstructed
# while decoding, so a seek there can shift them by a frame.
_SEEKABLE = frozenset({"mov", "mp4", "matroska", "webm"})
# Text and playlist "formats": the first would make a video of any text file, the others open
# further files that the caller did not name.
_REFUSED = frozenset({"tty", "concat", "hls", "dash", "lavfi", "image2", "sdp", "rtsp", "data"})
# Above 8K (33 million pixels). A damaged header can ask for far more memory than there is.
_MAX_PIXELS = 64 * 2**20
_DEFAULT_FPS = 30.0


def require_av() -> Any:
    """PyAV, imported where it is first needed."""
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            'Reading video files needs PyAV, which is not installed: pip install "openvclip[video]"'
        ) from error
    return av


def check_path(path: str | os.PathLike[str]) -> str:
    """The absolute path of an existing, readable, non-empty file, or one of our errors."""
    given = os.fspath(path)
    # Absolute: FFmpeg reads the "a:" of a relative name as a protocol.
    full = os.path.abspath(given)
    if os.path.isdir(full):
        raise VideoError(f"{given}: is a directory; expected a video file.")
    try:
        size = os.stat(full).st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoNotFoundError(
            f"{given}: no such file. Check the path, and the root that annotations are relative to."
        ) from error
    except (OSError, ValueError) as error:
        raise VideoError(f"{given}: cannot be opened ({error}).") from error
    if not os.path.isfile(full):
        raise VideoError(f"{given}: is not a regular file; expected a video file.")
    if size == 0:
        raise VideoError(f"{given}: the file is empty (0 bytes). Copy or download it again.")
    try:
        with open(full, "rb"):
            return full
    except PermissionError as error:
        raise VideoError(
            f"{given}: no permission to read it; change the file's mode or owner."
        ) from error
    except OSError as error:
        raise VideoError(f"{given}: cannot be opened ({error}).") from error


def _failures() -> tuple[type[Exception], ...]:
    # A damaged header also shows as plain Python errors of PyAV's bindings: a rate of 0 / 0, an
    # impossible pixel format, a time stamp beyond 64 bits.
    python = (OSError, ValueError, ArithmeticError, RuntimeError, LookupError, MemoryError)
    return (require_av().error.FFmpegError, *python)


@contextmanager
def decoder_errors(path: str) -> Iterator[None]:
    """Turns what FFmpeg and PyAV raise into :class:`VideoError`."""
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
    """What a pass over the packets of a stream, without decoding, tells.

    Attributes:
        count: packets that become a frame.
        stamps: their presentation times in ticks, rising; ``None`` if any lacks one or two agree.
    """

    count: int
    stamps: tuple[int, ...] | None


class Stream:
    """The first video stream of a file. A context manager; not safe to share between threads.

    ``alone=False`` says that other processes decode beside this one, as the workers of a
    ``DataLoader`` do: then the decoder takes one thread.
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
        """What the container says; ``frames`` may be missing."""
        return self._base

    @property
    def seekable(self) -> bool:
        """Whether a seek is sure to leave the time stamps of the frames as they are."""
        return bool(_SEEKABLE & set(self._container.format.name.split(",")))

    @property
    def in_order(self) -> bool:
        """Whether the packets' time stamps are those of the frames."""
        return self.seekable or not self._stream.codec_context.has_b_frames

    def ticks(self, seconds: float) -> int:
        """A time in seconds as ticks of the stream."""
        base = self._stream.time_base
        return max(1, round(seconds / float(base))) if base else 1

    @property
    def seconds(self) -> float | None:
        """How long the container says that the stream is."""
        base, duration = self._stream.time_base, self._base.duration
        return float(duration * base) if base and duration else None

    def seconds_at(self, stamp: int) -> float:
        """A time stamp as seconds from the first frame."""
        base = self._stream.time_base
        return float((stamp - self._base.start) * (base or 0))

    def seek(self, stamp: int) -> None:
        """Goes to a key frame at or before a time stamp, as far as the container can tell."""
        if self._frames is not None:
            self._frames.close()
            self._frames = None
        with decoder_errors(self.path):
            self._container.seek(stamp, backward=True, any_frame=False, stream=self._stream)

    def frames(self) -> Iterator[tuple[int, av.VideoFrame]]:
        """``(time stamp, frame)`` in the order of decoding; the same iterator until a seek."""
        if self._frames is None:
            self._frames = self._decode()
        return self._frames

    def _decode(self) -> Generator[tuple[int, av.VideoFrame], None, None]:
        step = _tick(self._base)
        following = self._base.start
        for packet in self._packets():
            for frame in self._decode_packet(packet):
                # Raw streams carry no time stamps: count on from the frame before.
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
                # The rest of a truncated file. The generator has ended; the decoder's last frames
                # are still to be had.
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
            # A damaged packet costs its own frames, not the rest of the video.
            self._note(error)
            return []
        for frame in frames:
            if frame.width * frame.height > _MAX_PIXELS:
                raise _too_large(self.path, frame.width, frame.height)
        return frames

    def _note(self, error: Exception) -> None:
        self.message = self.message or getattr(error, "strerror", None) or str(error)


def index_packets(path: str) -> PacketIndex:
    """Counts the frames of a stream from its packets: reads the file, decodes nothing."""
    stamps: list[int | None] = []
    with Stream(path) as stream:
        for packet in stream._packets():
            if packet.size and not packet.is_discard:
                stamps.append(packet.pts)
    known = sorted(stamp for stamp in stamps if stamp is not None)
    complete = len(known) == len(stamps) and len(set(known)) == len(known)
    return PacketIndex(len(stamps), tuple(known) if complete else None)


def with_count(info: StreamInfo, count: int) -> StreamInfo:
    """The stream's facts with a number of frames that was counted."""
    return replace(info, frames=count, counted=True)


def _open(path: str) -> Any:
    av = require_av()
    # A media file can name other files and addresses; nothing but this file is read.
    options = {"protocol_whitelist": "file"}
    try:
        # Titles in old encodings are common, and of no interest here.
        return av.open(path, metadata_errors="ignore", options=options)
    except TypeError:  # PyAV 19 takes any encoding as it is, and the argument no longer
        return av.open(path, options=options)


def _video_stream(container: Any, path: str, alone: bool) -> Any:
    kind = container.format.name
    if _REFUSED & set(kind.split(",")) or kind.endswith("_pipe"):
        raise VideoError(f"{path}: is not a video file (FFmpeg takes it for {kind!r}).")
    if not container.streams.video:
        found = ", ".join(stream.type for stream in container.streams) or "no stream at all"
        raise VideoError(f"{path}: has no video stream (found: {found}).")
    stream = container.streams.video[0]
    context = stream.codec_context
    if context is None:
        raise VideoError(f"{path}: this FFmpeg has no decoder for its video stream.")
    if context.width * context.height > _MAX_PIXELS:
        raise _too_large(path, context.width, context.height)
    # Workers of a DataLoader share the machine already: a decoder with a thread for every core in
    # each of them only makes them wait for each other.
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
