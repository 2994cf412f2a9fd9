"""Checking a video tensor before a tower encodes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openvclip.errors import VideoShapeError


def require_video(
    video: Tensor, frame_size: tuple[int, int] | None = None, weight: Tensor | None = None
) -> None:
    """Raise :class:`VideoShapeError` unless ``video`` is a float tensor ``[B, T, 3, H, W]``.

    B and T must be 1 or more.

    Args:
        video: the argument to check.
        frame_size: expected size of a frame in pixels, ``(H, W)``. None if any size is supported.
        weight: the weight of the patch embedding. The video must have its dtype, except under
            autocast. None if the tower converts the video.
    """
    if not isinstance(video, Tensor):
        raise VideoShapeError(_not_a_tensor(video))
    shape = list(video.shape)
    if video.ndim != 5:
        raise VideoShapeError(
            f"Got a tensor of shape {shape}; expected a video [B, T, C, H, W] (clips, frames, "
            "channels, height, width). Use video[None] for one clip [T, C, H, W]. Encode images "
            "[B, C, H, W] with encode_images(model, images), or give them to a classifier: plain "
            "CLIP. As clips of one frame, images can have other features."
        )
    if not video.is_floating_point():
        raise VideoShapeError(
            f"Got a video of dtype {_name_of(video.dtype)}; expected normalised floating-point "
            "frames. Divide by 255, then subtract the mean and divide by the standard deviation "
            "that the model was trained with."
        )
    if weight is not None and video.dtype != weight.dtype:
        _require_autocast(video, weight)
    if shape[0] == 0 or shape[1] == 0:
        empty = "frames (T = 0)" if shape[0] else "clips (B = 0)"
        raise VideoShapeError(
            f"Got a video without {empty}: shape {shape}; expected one or more clips of one or "
            "more frames."
        )
    if shape[2] != 3:
        hint = "permute it: video.permute(0, 1, 4, 2, 3)" if shape[4] == 3 else "expected RGB"
        raise VideoShapeError(
            f"Got a video of shape {shape} with {shape[2]} channels on axis 2; expected "
            f"[B, T, 3, H, W] ({hint})."
        )
    if frame_size is not None and (shape[3], shape[4]) != tuple(frame_size):
        raise VideoShapeError(
            f"Got frames of {shape[3]} x {shape[4]} pixels (H x W); the model takes "
            f"{frame_size[0]} x {frame_size[1]}. Resize and crop the frames first."
        )


def require_images(images: Tensor) -> None:
    """Raise :class:`VideoShapeError` unless ``images`` is a float tensor ``[B, 3, H, W]``."""
    if not isinstance(images, Tensor) or images.ndim != 4:
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise VideoShapeError(
            f"Got {shape}; expected images [B, C, H, W] (images, channels, height, width). Add the "
            "missing axis with image[None] for one image."
        )
    shape = list(images.shape)
    if shape[1] != 3:
        hint = "permute them: images.permute(0, 3, 1, 2)" if shape[3] == 3 else "expected RGB"
        raise VideoShapeError(
            f"Got images of shape {shape} with {shape[1]} channels on axis 1; expected "
            f"[B, 3, H, W] ({hint})."
        )
    if shape[0] == 0 or not images.is_floating_point():
        require_video(images[:, None])  # the errors of a video say what is wrong


def _require_autocast(video: Tensor, weight: Tensor) -> None:
    if not torch.is_autocast_enabled(video.device.type):
        dtype = _name_of(weight.dtype)
        raise VideoShapeError(
            f"Got a video of dtype {_name_of(video.dtype)}; the model's weights are {dtype}. "
            f"Convert the video with video.to(torch.{dtype}), or run the model under "
            "torch.autocast."
        )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _not_a_tensor(video: Any) -> str:
    if isinstance(video, torch.fx.Proxy):
        return (
            "torch.fx.symbolic_trace does not support expanded towers, because it does not know "
            "whether the input is an image batch or a video. Use torch.export.export(model, "
            "(video,))."
        )
    text = f"Got a {type(video).__name__}"
    if isinstance(video, (list, tuple)):
        lengths = [len(clip) if isinstance(clip, Tensor) and clip.ndim else "?" for clip in video]
        text += f" of {len(lengths)} clips with {', '.join(map(str, lengths))} frames"
    return (
        f"{text}; expected one tensor [B, T, C, H, W]. Stack clips of equal length with "
        "torch.stack. For clips of different lengths: sample or pad them to one length, or batch "
        "them by length."
    )
