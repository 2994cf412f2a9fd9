"""What a video can be: a file, bytes, a URL, an array of frames, an open decoder.

:func:`~openvclip.video.read_clip` and all other functions that read a video take every
:data:`VideoSource`. :func:`opened` turns a source into what the reader needs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeAlias, Union

import numpy as np
import torch
from torch import Tensor

from openvclip.errors import UsageError, VideoError, VideoOptionError, VideoShapeError, listed
from openvclip.video._inputs import (
    EncodedVideo,
    is_file_object,
    is_url,
    member_of,
    opened_input,
    position_of,
)
from openvclip.video._layout import channel_axis, channels_first, image_axis, is_array
from openvclip.video._numbered import DecoderVideo, FrameArray, NumberedVideo
from openvclip.video._stream import require_av

__all__ = [
    "FrameDecoder",
    "MediaContainer",
    "VideoFrames",
    "VideoSource",
    "all_bytes",
    "file_name",
    "first_bytes",
    "image_planes",
    "is_array",
    "is_several",
    "is_url",
    "kinds_of_sources",
    "member_of",
    "opened",
    "position_holder",
    "position_of",
    "rereadable",
    "source_name",
]


_FASTEST = 1e9  # frames per second


class FrameDecoder(Protocol):
    """A decoder with the methods of torchcodec's ``VideoDecoder``."""

    metadata: Any

    def __len__(self) -> int: ...

    def get_frames_at(self, indices: Any) -> Any:
        """Return the frames with these numbers."""


class MediaContainer(Protocol):
    """A container that PyAV has opened for reading."""

    @property
    def streams(self) -> Any:
        """The streams of the container."""

    def demux(self, *args: Any, **kwargs: Any) -> Any:
        """Return the packets of the container."""


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """The frames of a video, and their rate.

    Attributes:
        frames: uint8 RGB, ``[T, H, W, C]`` or ``[T, C, H, W]``: an array of NumPy, a tensor, or a
            list of T frames (arrays, tensors or images of Pillow) of one size. C is 3; 1 (grey) and
            4 (RGB and alpha) are converted. The frames of a list are stacked. OpenCV's frames are
            BGR: pass ``frames[..., ::-1]``.
        fps: frames per second. ``None`` is enough for the sampler ``"uniform"``, which uses no
            times.

    Raises:
        VideoShapeError: the frames are not uint8, have another shape, or there are none.
        VideoOptionError: ``fps`` is not a number above 0.
    """

    frames: np.ndarray[Any, Any] | Tensor | Sequence[Any]
    fps: float | None = None

    def __post_init__(self) -> None:
        if not is_array(self.frames):
            object.__setattr__(self, "frames", _stacked(self.frames))
        object.__setattr__(self, "fps", _checked_rate(self.fps))
        channel_axis(self.frames, source_name(self))

    def __repr__(self) -> str:
        return f"VideoFrames({list(np.shape(self.frames))}, fps={self.fps})"


VideoSource: TypeAlias = Union[
    str,
    "os.PathLike[str]",
    bytes,
    bytearray,
    memoryview,
    BinaryIO,
    "np.ndarray[Any, Any]",
    Tensor,
    VideoFrames,
    FrameDecoder,
    MediaContainer,
]
"""A video: everything that :func:`~openvclip.video.read_clip` reads.

- The path of a file.
- A URL that fsspec opens, such as ``"https://..."``, ``"s3://..."`` or ``"hf://..."``; or a file in
  a tar archive: ``"tar://clips/a.mp4::s3://bucket/0001.tar"``. A web server that sends nothing for
  30 seconds is an error. ``client_kwargs`` in the configuration of fsspec set another time.
- The ``bytes`` of a file, or a file object that is open in binary mode.
- uint8 frames ``[T, H, W, C]`` or ``[T, C, H, W]``, an array of NumPy or a tensor, with ``fps=``;
  or :class:`VideoFrames`, which holds the frames and their rate.
- A ``VideoDecoder`` of torchcodec, which the library ``datasets`` gives.
- A container that PyAV has opened for reading.
"""


def kinds_of_sources() -> str:
    """Return the kinds of sources in words, for error texts."""
    return (
        "a path, a URL, bytes, a binary file object, uint8 frames [T, H, W, C] or [T, C, H, W], "
        "VideoFrames, a torchcodec VideoDecoder or an open PyAV container"
    )


@contextmanager
def opened(
    video: VideoSource, fps: float | None = None, *, alone: bool = True
) -> Iterator[EncodedVideo | NumberedVideo]:
    """Context manager that prepares a video for reading.

    Args:
        video: the video.
        fps: frames per second of an array of frames.
        alone: whether this thread is the only one that decodes videos. If not, the decoder uses one
            thread.

    Raises:
        UsageError: ``video`` is of an unknown kind, a list, or a file object in text mode.
        VideoOptionError: ``fps`` is given for a video that is no array of frames, or is not a
            number above 0.
        VideoShapeError: see :class:`VideoFrames`.
        VideoNotFoundError: the file does not exist.
        VideoError: the video can't be opened.
        MissingDependencyError: fsspec, or what fsspec needs for the URL, is not installed.
    """
    name = source_name(video)
    if is_array(video):
        rate = _checked_rate(fps)
        yield FrameArray(video, channel_axis(video, name), rate, name)
        return
    if fps is not None:
        raise VideoOptionError(
            f"fps={fps!r} with {name}: fps is for arrays of frames. Files and decoders have their "
            "own frame rate, and VideoFrames(frames, fps) holds a rate."
        )
    if isinstance(video, VideoFrames):
        yield FrameArray(video.frames, channel_axis(video.frames, name), video.fps, name)
    elif _is_decoder(video):
        yield DecoderVideo(video, name)
    elif _is_container(video):
        require_av()
        with opened_input(_input_of(video, name), name) as encoded:
            yield encoded.with_(alone=alone, **_settings_of(video))
    elif isinstance(video, (str, os.PathLike, bytes, bytearray, memoryview)) or is_file_object(
        video
    ):
        require_av()
        with opened_input(video, name) as encoded:
            yield encoded.with_(alone=alone)
    else:
        raise UsageError(f"video is {_kind(video)}; expected {kinds_of_sources()}.{_hint(video)}")


@contextmanager
def opened_file(video: VideoSource, *, alone: bool = True) -> Iterator[EncodedVideo]:
    """Context manager that prepares a video for reading, if FFmpeg decodes it.

    Args:
        video: the video.
        alone: see :func:`opened`.

    Raises:
        VideoOptionError: ``video`` is an array of frames or a decoder.
        OpenVCLIPError: see :func:`opened`.
    """
    with opened(video, alone=alone) as source:
        if not isinstance(source, EncodedVideo):
            raise VideoOptionError(
                f"video is {source.name}; expected a file, a URL, bytes or a file object."
            )
        yield source


def source_name(video: object) -> str:
    """Return a name of a video for error texts and results: its path, or what it is."""
    if isinstance(video, (str, os.PathLike)):
        return os.fspath(video)
    if isinstance(video, (bytes, bytearray, memoryview)):
        return f"<{len(video)} bytes>"
    if isinstance(video, VideoFrames):
        return f"<{len(video.frames)} frames>"
    if isinstance(video, (np.ndarray, Tensor)):
        return f"<{video.shape[0]} frames>" if video.ndim == 4 else f"<{_kind(video)[2:]}>"
    for attribute in ("name", "filename"):  # of file objects, and of images of Pillow
        name = getattr(video, attribute, None)
        if isinstance(name, str) and name and not name.startswith("<"):
            return name
    return f"<{type(video).__name__}>"


def file_name(path: str) -> str:
    """Return the last part of a path or a URL, or of the name of a file in an archive."""
    member = member_of(path)
    plain = (path if member is None else member[0]).rstrip("/\\")
    return os.path.basename(plain) or plain or path


def is_several(videos: object) -> bool:
    """Return whether ``videos`` is a list, a tuple or an iterator of videos, not one video."""
    if isinstance(videos, (list, tuple)):
        return True
    return isinstance(videos, Iterator) and not is_file_object(videos)


def position_holder(video: Any) -> object | None:
    """Return the part of a video that has a position, such as its file object, or ``None``.

    Two threads must not read such a part at the same time.
    """
    if _is_container(video):
        return getattr(video.file, "file", None)
    return video if is_file_object(video) or _is_decoder(video) else None


def rereadable(video: Any) -> Any:
    """Return ``video``, or its bytes if it is a file object that can't seek."""
    if is_file_object(video) and not _is_container(video) and position_of(video) is None:
        try:
            return video.read()
        except Exception as error:  # the errors of a file system have any class
            raise VideoError(f"{source_name(video)}: can't be read ({error}).") from error
    return video


def first_bytes(video: Any, count: int) -> bytes | None:
    """Return the first bytes of bytes or of a file object that can seek; ``None`` for others."""
    if isinstance(video, (bytes, bytearray, memoryview)):
        return bytes(video[:count])
    if not is_file_object(video) or _is_container(video) or _is_decoder(video):
        return None
    with opened_input(video, source_name(video)) as encoded:
        return _read(encoded, count)


def all_bytes(video: VideoSource) -> bytes:
    """Return the bytes of a file, a file object or a URL.

    Raises:
        VideoNotFoundError, VideoError, UsageError, MissingDependencyError: see :func:`opened`.
    """
    with opened_input(video, source_name(video)) as encoded:
        return _read(encoded, -1)


def _read(encoded: EncodedVideo, count: int) -> bytes:
    data = encoded.opened()
    if isinstance(data, str):
        with open(data, "rb") as file:
            return file.read(count)
    return data.read(count)


def image_planes(image: np.ndarray[Any, Any] | Tensor) -> Tensor:
    """Return an image as uint8 ``[3, H, W]`` on the CPU.

    Args:
        image: uint8 ``[H, W, C]`` or ``[C, H, W]``.

    Raises:
        VideoShapeError: the image has another dtype or shape.
    """
    axis = image_axis(image, "the image")
    if isinstance(image, Tensor):
        return channels_first(image.cpu(), axis)
    return channels_first(torch.from_numpy(np.array(image)), axis)


def _stacked(frames: Any) -> Any:
    if isinstance(frames, (str, bytes, Mapping)) or not isinstance(frames, Sequence):
        raise VideoShapeError(
            f"frames is {_kind(frames)}; expected an array, a tensor or a list of frames."
        )
    if not frames:
        raise VideoShapeError("frames is an empty list; expected at least one frame.")
    arrays: list[Any] = [
        np.asarray(f.convert("RGB")) if hasattr(f, "convert") else f for f in frames
    ]
    if not all(is_array(array) for array in arrays):
        odd = next(array for array in arrays if not is_array(array))
        raise VideoShapeError(
            f"frames holds {_kind(odd)}; expected arrays, tensors or images of Pillow."
        )
    shapes = list(dict.fromkeys(str(list(array.shape)) for array in arrays))
    if len(shapes) > 1:
        raise VideoShapeError(
            f"frames have different shapes: {listed(shapes)}. Resize the frames to one size."
        )
    if all(isinstance(array, Tensor) for array in arrays):
        return torch.stack(arrays)
    return np.stack([np.asarray(array) for array in arrays])


def _checked_rate(fps: Any) -> float | None:
    if fps is None:
        return None
    try:
        rate = float(fps)  # PyAV gives a Fraction
    except (TypeError, ValueError, OverflowError):
        rate = math.nan
    if isinstance(fps, bool) or not 1 / _FASTEST <= rate <= _FASTEST:
        raise VideoOptionError(
            f"fps={fps!r}: expected a number of frames per second above 0, from "
            f"{1 / _FASTEST:.9f} to {_FASTEST:,.0f}."
        )
    return rate


def _is_decoder(video: object) -> bool:
    return hasattr(video, "get_frames_at") and hasattr(video, "metadata")


def _is_container(video: object) -> bool:
    return hasattr(video, "demux") and hasattr(video, "streams")


def _input_of(container: Any, name: str) -> Any:
    """Return the path or the file object of a container of PyAV.

    The video is opened again, so the position of the container does not change.
    """
    own = getattr(container.file, "file", container.file)
    if own is not None:
        return own
    if not os.path.exists(container.name) and not is_url(container.name):
        raise VideoError(
            f"{name}: the container is of no file that can be opened again. Pass the frames: "
            "VideoFrames(frames, fps)."
        )
    return container.name


def _settings_of(container: Any) -> dict[str, Any]:
    options = {**(container.options or {}), **(container.container_options or {})}
    return {"format": container.format.name.partition(",")[0], "options": options}


def _kind(video: object) -> str:
    if isinstance(video, (np.ndarray, Tensor)):
        return f"a {type(video).__name__} {video.dtype} {list(video.shape)}"
    return f"a {type(video).__name__}"


def _hint(video: object) -> str:
    if isinstance(video, (list, tuple)):
        if not video:
            return " The list is empty."
        return " For a list of frames: VideoFrames(frames, fps). For several videos: read_clips."
    return ""
