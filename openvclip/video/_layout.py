"""Arrays of frames: their dtype, the axis of their channels, and RGB with three channels.

The rule for the axis: one axis of 3 is the channels. Otherwise one axis of 1 (grey) or 4 (RGB and
alpha) is the channels. Otherwise the array is refused, and the error says why.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from openvclip.errors import VideoShapeError

__all__ = [
    "advice_on_pixels",
    "channel_axis",
    "channels_first",
    "image_axis",
    "is_array",
    "require_bytes",
]

_LAYOUTS = "uint8 [T, H, W, C] or [T, C, H, W]"


def is_array(video: object) -> bool:
    """Return whether ``video`` is an array of NumPy or a tensor."""
    return isinstance(video, (np.ndarray, Tensor))


def require_bytes(frames: Any, name: str, expected: str = _LAYOUTS) -> None:
    """Check that an array has the dtype uint8, and values.

    Raises:
        VideoShapeError: the dtype is another; the error says how to convert the array. Or the
            tensor is on the meta device, which holds no values.
    """
    if isinstance(frames, Tensor) and frames.is_meta:
        raise VideoShapeError(
            f"{name}: the tensor is on the meta device and has no values; expected {expected}."
        )
    if frames.dtype not in (torch.uint8, np.uint8):
        kind = "array" if isinstance(frames, np.ndarray) else "tensor"
        shape = f"{frames.dtype} {list(frames.shape)}"
        raise VideoShapeError(
            f"{name}: the {kind} is {shape}; expected {expected}. {advice_on_pixels(frames)}"
        )


def advice_on_pixels(video: Any) -> str:
    """Return how to turn pixels that are refused into uint8, as far as their values tell it.

    Args:
        video: a tensor or an array of NumPy.
    """
    values = video if isinstance(video, Tensor) else torch.empty(0)
    if not isinstance(video, Tensor) and video.dtype.kind in "fiub":
        values = torch.from_numpy(video.astype("float32"))
    if values.dtype == torch.uint8 or not values.numel() or values.is_complex() or values.is_meta:
        return "Pass the pixels before the normalisation."
    low, high = (float(end) for end in values.detach().float().aminmax())
    if not (low >= 0 and high <= 255):  # also NaN
        return (
            f"The values are between {low:g} and {high:g}; pass the pixels before the "
            "normalisation, whole numbers from 0 to 255."
        )
    as_bytes = ".to(torch.uint8)" if isinstance(video, Tensor) else '.astype("uint8")'
    if values.is_floating_point() and high <= 1:
        # Also a black video in 0 to 255, which is the same black.
        return f"The values are between 0 and 1: pass (video * 255).round(){as_bytes}."
    rounded = "video.round()" if values.is_floating_point() else "video"
    return f"The values are between 0 and 255: pass {rounded}{as_bytes}."


def channel_axis(frames: Any, name: str) -> int:
    """Return the axis of the channels of frames, 1 or 3.

    Args:
        frames: an array or a tensor.
        name: name of the video for error texts.

    Raises:
        VideoShapeError: the array has another dtype than uint8, another number of axes than 4, an
            empty axis, or no axis of channels or two.
    """
    shape = list(frames.shape)
    if len(shape) != 4:
        raise VideoShapeError(f"{name}: has the shape {shape}; expected {_LAYOUTS}.{_rank(shape)}")
    require_bytes(frames, name)
    if 0 in shape:
        raise VideoShapeError(f"{name}: has the shape {shape}: one of its dimensions is empty.")
    axis = _axis(shape, 1, 3)
    if axis is None:
        swapped = " Swap time and channels: frames.swapaxes(0, 1)." if shape[0] == 3 else ""
        raise VideoShapeError(
            f"{name}: has the shape {shape}, which does not tell the axis of the channels; "
            f"expected {_LAYOUTS} with 3 channels (or 1 or 4).{swapped}"
        )
    return axis


def image_axis(image: Any, name: str) -> int:
    """Return the axis of the channels of an image, 0 or 2.

    Raises:
        VideoShapeError: see :func:`channel_axis`.
    """
    shape = list(image.shape)
    expected = "uint8 [H, W, C] or [C, H, W]"
    require_bytes(image, name, expected)
    axis = _axis(shape, 0, 2) if len(shape) == 3 and 0 not in shape else None
    if axis is None:
        raise VideoShapeError(
            f"{name}: has the shape {shape}; expected an image, {expected} with 3 channels (or 1 "
            "or 4). For a grey video [T, H, W], add an axis: frames[..., None]."
        )
    return axis


def channels_first(frames: Tensor, axis: int) -> Tensor:
    """Return uint8 frames as contiguous ``[..., 3, H, W]``.

    Grey is repeated over the channels, and an alpha channel is dropped.

    Args:
        frames: uint8 frames.
        axis: the axis of the channels, the last or the third from the end.
    """
    planes = frames.movedim(axis, -3)[..., :3, :, :]
    return planes.expand(*planes.shape[:-3], 3, *planes.shape[-2:]).contiguous()


def _axis(shape: list[int], first: int, last: int) -> int | None:
    for sizes in ((3,), (1, 4)):
        axes = [axis for axis in (first, last) if shape[axis] in sizes]
        if axes:
            return axes[0] if len(axes) == 1 else None
    return None


def _rank(shape: list[int]) -> str:
    if len(shape) == 5:
        return " Pass the clips of a batch one by one: list(batch)."
    if len(shape) == 3:
        return " Add the axis of the channels to a grey video: frames[..., None]."
    if len(shape) == 1:
        return " Pass the bytes of a file as bytes: array.tobytes()."
    return ""
