"""Read a video or an image as the input of a model."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from torch import Tensor

from openvclip.errors import UsageError, VideoOptionError
from openvclip.models.preprocess import is_image_file, read_image
from openvclip.video.decoding import read_views
from openvclip.video.sampling import Sampling
from openvclip.video.sources import (
    VideoFrames,
    VideoSource,
    first_bytes,
    is_url,
    member_of,
    rereadable,
    source_name,
)
from openvclip.video.transforms import Transform

__all__ = ["is_image", "read_input", "require_source"]

# The first bytes of the image formats of `is_image_file`. A GIF is a video.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\x00", b"MM\x00*")


def read_input(
    video: VideoSource,
    sampling: Sampling,
    transform: Transform,
    *,
    fps: float | None = None,
    alone: bool = True,
) -> Tensor:
    """Return a video or an image as the input of a model.

    Args:
        video: a video, see :data:`openvclip.video.VideoSource`; or an image: a file with the
            extension of an image format, the bytes of such a file, an image of Pillow, or uint8
            ``[H, W, C]`` or ``[C, H, W]``.
        sampling: the frames of a video to read.
        transform: a transform from 8-bit frames to the input of the model.
        fps: frames per second, if ``video`` is an array of frames.
        alone: see :func:`openvclip.video.decoding.read_views`.

    Returns:
        The views of a video, ``[n, T, C, H, W]``; or the crops of an image, ``[n, C, H, W]``. Each
        crop of a view counts as a view.

    Raises:
        UsageError: see :func:`require_source`.
        VideoError, VideoShapeError, VideoOptionError, MissingDependencyError: the video can't be
            read; see :func:`openvclip.video.read_clip`.
    """
    require_source(video)
    video = rereadable(video)
    if not is_image(video):
        views = read_views(video, sampling, transform=transform, fps=fps, alone=alone)
        return views.flatten(0, -5)
    if fps is not None:
        raise VideoOptionError(f"fps={fps!r} with {source_name(video)}: an image has no rate.")
    return transform(read_image(video)[None, None]).flatten(0, -5)[:, 0]


def require_source(video: object) -> None:
    """Raise :class:`UsageError` if ``video`` is a list, or frames that are preprocessed already."""
    if isinstance(video, (list, tuple)):
        advice = (
            " For a list of frames: openvclip.video.VideoFrames(frames, fps). For several videos: "
            "openvclip.VideoCLIP."
        )
        raise UsageError(f"video is a {type(video).__name__}; expected one video.{advice}")
    if isinstance(video, Tensor) and video.is_floating_point():
        raise UsageError(
            "video is a Tensor; expected the path of a file, or uint8 frames [T, H, W, C] or "
            f"[T, C, H, W]. The tensor is {video.dtype} {list(video.shape)}. For clips that are "
            "preprocessed already, create a ZeroShotClassifier and call it: it returns the logits "
            "of clips [B, T, C, H, W] or images [B, C, H, W]."
        )


def is_image(video: Any) -> bool:
    """Return whether a source is an image.

    Files and URLs are recognised by their extension, bytes and file objects by their first bytes,
    arrays by their three axes.
    """
    if isinstance(video, (str, os.PathLike)):
        return is_image_file(_name_in(os.fspath(video)) if is_url(video) else video)
    if isinstance(video, (np.ndarray, Tensor)):
        return video.ndim == 3
    if isinstance(video, VideoFrames):
        return False
    head = first_bytes(video, 16)
    if head is None:
        return _is_pillow(video)
    return head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _name_in(url: str) -> str:
    """Return the path in a URL, or the name in an archive."""
    member = member_of(url)
    return urlsplit(url).path if member is None else member[0]


def _is_pillow(image: object) -> bool:
    return hasattr(image, "getbands") and hasattr(image, "convert")
