"""Videos with captions for training: one caption of each video in an epoch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from openvclip.errors import AnnotationError, VideoNotFoundError, listed, near_path
from openvclip.training.batches import seed_of
from openvclip.video import VideoDataset
from openvclip.video.captions import (
    locate_captioned,
    read_captions,
    read_video_names,
    video_name,
)

__all__ = ["CaptionedFiles", "CaptionedVideos", "find_captioned"]

_TITLES = ("video_id", "video", "path")


class CaptionedVideos(Dataset[tuple[Tensor, str, str]]):
    """Video files with captions. An item is ``(video, caption, path)``.

    A video with several captions has one of them in each epoch. The caption depends on the seed,
    the epoch and the video alone, as the augmentation does: the number of workers and of processes
    changes nothing, and a run that resumes goes on with the captions of a run that never stopped.

    If a video can't be read, the item is another video with a caption of that video; see
    :class:`openvclip.video.VideoDataset`.

    Args:
        videos: the videos; the class index of a sample is its position.
        captions: the captions of each video, at least one.
    """

    def __init__(self, videos: VideoDataset, captions: Sequence[Sequence[str]]) -> None:
        self.videos, self.captions = videos, captions

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> tuple[Tensor, str, str]:
        video, position = self.videos[index][:2]
        texts = self.captions[position]
        draw = seed_of("caption", self.videos.seed, self.videos.epoch, position) % len(texts)
        return video, texts[draw], self.path(position)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; see :meth:`openvclip.video.VideoDataset.set_epoch`."""
        self.videos.set_epoch(epoch)

    def path(self, index: int) -> str:
        """Return the path of the video with this index."""
        return self.videos.path(index)


class CaptionedFiles(NamedTuple):
    """The files of captioned videos.

    Attributes:
        paths: path of each video, relative to the folder of the videos.
        captions: the captions of each video.
        warnings: what was left out, in words.
    """

    paths: list[str]
    captions: list[list[str]]
    warnings: list[str]


def find_captioned(annotations: Path, folder: Path, only: Path | None = None) -> CaptionedFiles:
    """Read captions, and find the files of their videos.

    Args:
        annotations: the captions, in one of the formats of
            :func:`openvclip.video.captions.read_captions`.
        folder: folder of the videos. A video is found by its path, or by its name in any subfolder
            and with any extension of a video.
        only: a list of the videos to use, such as those of a training set. Default: all videos.

    Raises:
        AnnotationError: a file can't be read, or no video has captions.
        VideoNotFoundError: the folder does not exist, or none of the videos is in the folder.
    """
    captions = {name: [t for t in texts if t] for name, texts in read_captions(annotations).items()}
    captions = {name: texts for name, texts in captions.items() if texts}
    warnings: list[str] = []
    if only is not None:
        captions = _chosen(captions, annotations, only, warnings)
    if not captions:
        raise AnnotationError(f"{annotations}: all captions are empty; expected texts.")
    located = locate_captioned(list(captions), folder)
    files: dict[str, list[str]] = {}
    missing: dict[str, int] = {}
    for (name, texts), path in zip(captions.items(), located, strict=True):
        if os.path.isfile(os.path.join(folder, path)):
            files.setdefault(path, []).extend(texts)
        else:
            missing[name] = len(texts)
    if not files:
        near = near_path(os.path.join(folder, located[0]))
        raise VideoNotFoundError(
            f"None of the {len(captions)} videos of {annotations} is in {folder}: "
            f"{listed(list(missing), 10)}{near}. Check the folder of the videos."
        )
    if missing:
        total = sum(map(len, captions.values()))
        warnings.append(
            f"{len(missing)} of {len(captions)} videos, with {sum(missing.values())} of {total} "
            f"captions, are not in {folder} and are left out: {listed(list(missing), 10)}."
        )
    return CaptionedFiles(list(files), list(files.values()), warnings)


def _chosen(
    captions: dict[str, list[str]], annotations: Path, only: Path, warnings: list[str]
) -> dict[str, list[str]]:
    """Return the captions of the videos of a list."""
    names = read_video_names(os.fspath(only))
    names = names[1:] if names[0].strip().casefold() in _TITLES else names
    wanted = {video_name(name) for name in names}
    chosen = {name: texts for name, texts in captions.items() if video_name(name) in wanted}
    found = {video_name(name) for name in chosen}
    bare = [name for name in names if video_name(name) not in found]
    if not chosen:
        raise AnnotationError(
            f"{only}: none of its {len(names)} videos has captions in {annotations}: "
            f"{listed(bare, 10)}; expected a list of videos such as {listed(list(captions), 1)}."
        )
    if bare:
        warnings.append(
            f"{len(bare)} of {len(names)} videos of {only} have no captions in {annotations} and "
            f"are left out: {listed(bare, 10)}."
        )
    return chosen
