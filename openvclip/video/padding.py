"""Batches of clips that have different numbers of frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openvclip.errors import VideoShapeError
from openvclip.video.dataset import VideoSample

__all__ = ["PaddedSamples", "pad_clips", "pad_samples"]

_TIME = -4  # the axis of the frames in [..., T, C, H, W]


class PaddedSamples(NamedTuple):
    """A batch of samples of :class:`openvclip.video.VideoDataset` with ``details=True``.

    Attributes:
        video: the clips, with zeros after the last frame of a clip: ``[B, ..., T, C, H, W]``.
        label: class indices, int64 ``[B]``.
        position: indices into ``dataset.samples``, int64 ``[B]``.
        error: the reason why each video could not be read, or ``""``.
        mask: whether a frame belongs to its clip, bool ``[B, T]``.
    """

    video: Tensor
    label: Tensor
    position: Tensor
    error: list[str]
    mask: Tensor


def pad_clips(clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return clips of different lengths as one batch, and a mask of its frames.

    Args:
        clips: B clips ``[..., t, C, H, W]`` that differ in their numbers of frames ``t`` alone.

    Returns:
        The batch ``[B, ..., T, C, H, W]``, where T is the largest number of frames, with zeros
        after the last frame of a clip; and a bool mask ``[B, T]``, true for the frames of a clip.

    Raises:
        VideoShapeError: there are no clips, a tensor has fewer than four dimensions, or the clips
            differ in more than their numbers of frames.

    Example:
        >>> video, mask = pad_clips([torch.ones(2, 3, 8, 8), torch.ones(5, 3, 8, 8)])
        >>> video.shape, mask.sum(dim=1)
        (torch.Size([2, 5, 3, 8, 8]), tensor([2, 5]))
    """
    shapes = {(*clip.shape[:_TIME], *clip.shape[_TIME + 1 :]) for clip in clips}
    if len(shapes) != 1 or any(clip.ndim < -_TIME for clip in clips):
        given = sorted({str(list(clip.shape)) for clip in clips})
        raise VideoShapeError(
            f"clips have the shapes {given}; expected at least one clip [..., t, C, H, W], and no "
            "difference but t. Give the data set a transform, which makes all frames equally large."
        )
    lengths = [clip.shape[_TIME] for clip in clips]
    longest = max(lengths)
    shape = list(clips[0].shape)
    shape[_TIME] = longest
    video = clips[0].new_zeros([len(clips), *shape])
    for row, clip, length in zip(video, clips, lengths, strict=True):
        row[..., :length, :, :, :] = clip
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return video, mask


def pad_samples(samples: Sequence[VideoSample]) -> PaddedSamples:
    """Collate samples whose clips have different lengths: ``collate_fn`` of a ``DataLoader``.

    Args:
        samples: samples of a :class:`openvclip.video.VideoDataset` with ``details=True`` and the
            sampler ``"seconds"``.

    Raises:
        VideoShapeError: see :func:`pad_clips`.
    """
    video, mask = pad_clips([sample.video for sample in samples])
    return PaddedSamples(
        video,
        torch.tensor([sample.label for sample in samples]),
        torch.tensor([sample.position for sample in samples]),
        [sample.error for sample in samples],
        mask,
    )
