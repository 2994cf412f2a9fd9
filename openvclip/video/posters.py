"""Pictures of videos as small JPEG files: what a page shows in place of a video."""

from __future__ import annotations

import io
import os
from typing import Any, NamedTuple

from openvclip.errors import MissingDependencyError
from openvclip.video.excerpts import ShownPicture, pictures_at
from openvclip.video.sources import VideoSource, is_url

__all__ = ["Poster", "poster_at", "scaled_image", "why_no_poster"]

_QUALITY = 80  # of the JPEG files, of 100


class Poster(NamedTuple):
    """A picture of a video.

    Attributes:
        data: a JPEG file.
        width: pixels.
        height: pixels.
    """

    data: bytes
    width: int
    height: int


def poster_at(video: VideoSource, seconds: float, *, width: int = 400) -> Poster:
    """Return the frame of a video at some time as a JPEG file.

    Args:
        video: see :func:`openvclip.video.excerpts.pictures_at`.
        seconds: the time from the first frame of the video. After the end it is the last frame.
        width: the longest side, in pixels. Smaller videos are not enlarged.

    Raises:
        VideoNotFoundError: the video does not exist.
        VideoError: the video can't be read.
        MissingDependencyError: PyAV or Pillow is not installed.
    """
    image = scaled_image(next(pictures_at(video, [seconds])), width)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=_QUALITY, optimize=True)
    return Poster(data.getvalue(), *image.size)


def why_no_poster(path: str) -> str:
    """Return what a page shows in place of the picture of a video that can't be read.

    Args:
        path: the video file, or its URL.
    """
    if is_url(path) or os.path.exists(path):
        return "The video can't be read."
    return "The video file is missing."


def scaled_image(picture: ShownPicture, longest: int) -> Any:
    """Return a picture as an image of Pillow with square pixels.

    Args:
        picture: the picture.
        longest: the longest side, in pixels. A smaller picture is not enlarged.

    Raises:
        MissingDependencyError: Pillow is not installed.
    """
    Image = _pillow()  # noqa: N806
    height, width = picture.pixels.shape[:2]
    if picture.aspect >= width / height:  # square pixels, without a loss
        shape = (height * picture.aspect, float(height))
    else:
        shape = (float(width), width / picture.aspect)
    scale = min(1.0, longest / max(shape))
    size = max(2, round(shape[0] * scale)), max(2, round(shape[1] * scale))
    image = Image.fromarray(picture.pixels)
    if size == image.size:
        return image
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "Pillow is not installed, but it is needed for pictures of videos. Install it with: "
            'pip install "openvclip[video]"'
        ) from error
    return Image
