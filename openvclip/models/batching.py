"""Read many videos ahead, and encode several of them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from openvclip.commands.progress import progress_bar
from openvclip.errors import OpenVCLIPError, UsageError, VideoError, VideoShapeError
from openvclip.models.reading import read_input
from openvclip.video.ahead import default_threads, in_order
from openvclip.video.sampling import Sampling
from openvclip.video.sources import source_name
from openvclip.video.transforms import Transform

__all__ = [
    "UNREADABLE",
    "VideoReader",
    "encode_each",
    "encode_one",
    "encode_readable",
    "require_batch_size",
]

Name = TypeVar("Name")

UNREADABLE = (VideoError, VideoShapeError, UsageError)
"""The errors of a single video. Wrong options and missing packages concern all videos."""

Encode = Callable[[Tensor], Tensor]
"""A function from views ``[n, T, C, H, W]`` or images ``[n, C, H, W]`` to rows ``[n, D]``."""


@dataclass(frozen=True)
class VideoReader:
    """How videos are read and encoded.

    Attributes:
        sampling: the frames of a video.
        transform: a transform from 8-bit frames to the input of the model.
        fps: frames per second of arrays of frames.
        batch_size: number of videos to encode at a time.
        num_threads: see :func:`openvclip.video.read_clips`.
        progress: whether to show a progress bar. ``None``: only in a terminal.

    Raises:
        UsageError: ``batch_size`` is below 1.
        VideoOptionError: ``num_threads`` is negative.
    """

    sampling: Sampling
    transform: Transform
    fps: float | None = None
    batch_size: int = 4
    num_threads: int | None = None
    progress: bool | None = None

    def __post_init__(self) -> None:
        default_threads(self.num_threads)
        require_batch_size(self.batch_size)

    def read(self, video: Any, alone: bool = False) -> tuple[str, Tensor]:
        """Return the name and the views of a video, or the crops of an image.

        Args:
            video: the video or the image.
            alone: see :func:`openvclip.video.decoding.read_views`.
        """
        views = read_input(video, self.sampling, self.transform, fps=self.fps, alone=alone)
        return source_name(video), views


def require_batch_size(size: object) -> None:
    """Raise :class:`UsageError` unless ``size`` is a whole number of at least 1."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UsageError(f"batch_size={size!r}: expected a whole number of at least 1.")


def encode_one(video: Any, encode: Encode, reader: VideoReader) -> tuple[str, Tensor]:
    """Return the name of a video, and the mean over its views of what ``encode`` returns."""
    name, views = reader.read(video, alone=True)
    return name, encode(views).mean(dim=0)


def encode_each(videos: Any, encode: Encode, reader: VideoReader) -> list[tuple[str, Tensor]]:
    """Return the result of :func:`encode_one` for each video, encoded in batches.

    Raises:
        UsageError: there are no videos.
    """
    total = len(videos) if isinstance(videos, (list, tuple)) else None
    disable = None if reader.progress is None else not reader.progress
    rows: list[tuple[str, Tensor]] = []
    # Closed at once if encoding fails, so that no thread goes on decoding.
    with closing(in_order(reader.read, videos, reader.num_threads)) as ahead:
        bar = progress_bar(ahead, total=total, desc="videos", unit="video", disable=disable)
        for batch in _batched(bar, reader.batch_size):
            encoded = encode(torch.cat([views for _, views in batch]))
            parts = encoded.split([len(views) for _, views in batch])
            means = [part.mean(dim=0) for part in parts]
            rows += [(name, mean) for (name, _), mean in zip(batch, means, strict=True)]
    if not rows:
        raise UsageError("videos is empty; expected at least one video.")
    return rows


def encode_readable(
    videos: Iterable[Any], encode: Encode, reader: VideoReader
) -> tuple[dict[int, Tensor], dict[int, OpenVCLIPError]]:
    """Return the results of :func:`encode_one` for the videos that can be read, and the errors.

    Both dicts have the places of the videos as keys.
    """
    rows: dict[int, Tensor] = {}
    errors: dict[int, OpenVCLIPError] = {}

    def read(item: tuple[int, Any]) -> tuple[int, Tensor | None]:
        place, video = item
        try:
            return place, reader.read(video)[1]
        except UNREADABLE as error:
            errors[place] = error
            return place, None

    threads = reader.num_threads
    ahead = in_order(read, enumerate(videos), threads, source=lambda item: item[1])
    with closing(ahead):
        readable = ((place, views) for place, views in ahead if views is not None)
        for batch in _batched(readable, reader.batch_size):
            encoded = encode(torch.cat([views for _, views in batch]))
            parts = encoded.split([len(views) for _, views in batch])
            rows |= {place: part.mean(dim=0) for (place, _), part in zip(batch, parts, strict=True)}
    return rows, errors


def _batched(
    items: Iterable[tuple[Name, Tensor]], size: int
) -> Iterator[list[tuple[Name, Tensor]]]:
    """Yield lists of at most ``size`` neighbours whose tensors can be concatenated."""
    batch: list[tuple[Name, Tensor]] = []
    for name, views in items:
        if batch and batch[0][1].shape[1:] != views.shape[1:]:
            yield batch
            batch = []
        batch.append((name, views))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
