"""Attention over neighbouring frames: Equation 3 of Open-VCLIP, shared by all towers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from openvclip.errors import VideoShapeError
from openvclip.towers.attention_cpu import attend_frame_by_frame
from openvclip.towers.view import FrameView


class TemporalTower:
    """Marks the class of an expanded tower; it answers videos ``[B, T, C, H, W]`` and images."""


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: FrameView,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attention of each frame's queries over the keys of the frames in view (Equation 3).

    Args:
        q: queries ``[B, T, N, heads, d]``: clips, frames, tokens of a frame.
        k: keys, same shape.
        v: values, same shape.
        view: the frames in view.
        dropout_p: dropout on the attention weights.
        scale: factor of the scores; ``1 / sqrt(d)`` by default.

    Returns:
        ``[B, T, N, heads * d]``.
    """
    b, t, n, heads, d = q.shape
    one_dtype = q.dtype == k.dtype == v.dtype  # else autocast has to make it one, as SDPA does
    if view.window > 0 and dropout_p == 0.0 and one_dtype and _prefers_frame_by_frame(q):
        return attend_frame_by_frame(q, k, v, view, scale).flatten(-2)
    mask = None
    if view.window > 0:
        k, v = _in_view(k, view), _in_view(v, view)
        if view.boundary == "mask":
            mask = _inside_mask(b, t, n, view.window, q.device)
    out = functional.scaled_dot_product_attention(
        _by_head(q), _by_head(k), _by_head(v), attn_mask=mask, dropout_p=dropout_p, scale=scale
    )
    return out.transpose(1, 2).reshape(b, t, n, heads * d)


def _prefers_frame_by_frame(q: Tensor) -> bool:
    """Whether one kernel call a frame, on views, beats one call for all frames, on copies.

    On a CPU it does, since there the copies cost more than the attention itself. A GPU wants few
    large calls, and a compiled graph no loop over frames. Who turns the flash kernels off with
    ``sdpa_kernel`` wants another kernel, such as the one that can be differentiated twice.
    """
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(torch.backends.cuda.flash_sdp_enabled())  # that of CPUs, too


def _by_head(x: Tensor) -> Tensor:
    """``[B, T, L, heads, d]`` to ``[B * T, heads, L, d]``, the layout of the fused kernels."""
    return x.flatten(0, 1).transpose(1, 2)


def _in_view(x: Tensor, view: FrameView) -> Tensor:
    """``[B, T, N, ...]`` to ``[B, T, (2 window + 1) N, ...]``: the frames in view, in order."""
    gathered: Tensor = _GatherFrames.apply(x, view.window, view.boundary == "replicate")
    return gathered.flatten(2, 3)


def _inside_mask(b: int, t: int, n: int, window: int, device: torch.device) -> Tensor:
    """Which keys belong to frames inside the clip: bool ``[B * T, 1, 1, (2 window + 1) N]``."""
    frames = torch.arange(t, device=device)[:, None]
    frames = frames + torch.arange(-window, window + 1, device=device)
    inside = ((frames >= 0) & (frames < t)).repeat_interleave(n, dim=1)
    return inside.repeat(b, 1)[:, None, None, :]


def _shifts(t: int, window: int) -> Iterator[tuple[int, int, int, int]]:
    """``(slot, offset, first, last)``: frames first..last-1 have their neighbour in the clip."""
    for slot, offset in enumerate(range(-window, window + 1)):
        first = min(max(0, -offset), t)
        yield slot, offset, first, max(first, min(t, t - offset))


class _GatherFrames(torch.autograd.Function):
    """Each frame with its neighbours: ``[B, T, ...]`` to ``[B, T, 2 window + 1, ...]``.

    A function of its own, because the backward pass of sliced and concatenated copies makes one
    zero-filled gradient for each slice, where one buffer that is added into is enough.
    """

    @staticmethod
    def forward(x: Tensor, window: int, replicate: bool) -> Tensor:
        t = x.shape[1]
        out = x.new_empty(x.shape[0], t, 2 * window + 1, *x.shape[2:])
        for slot, offset, first, last in _shifts(t, window):
            out[:, first:last, slot] = x[:, first + offset : last + offset]
            out[:, :first, slot] = x[:, :1] if replicate else 0
            out[:, last:, slot] = x[:, -1:] if replicate else 0
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
        ctx.window, ctx.replicate = inputs[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        t = grad.shape[1]
        total = grad[:, :, ctx.window].clone(memory_format=torch.contiguous_format)
        for slot, offset, first, last in _shifts(t, ctx.window):
            if offset != 0:
                total[:, first + offset : last + offset] += grad[:, first:last, slot]
            if ctx.replicate:
                total[:, 0] += grad[:, :first, slot].sum(1)
                total[:, -1] += grad[:, last:, slot].sum(1)
        return total, None, None


def require_video(
    video: Tensor, frame_size: tuple[int, int] | None = None, weight: Tensor | None = None
) -> None:
    """Raise :class:`VideoShapeError` unless ``video`` is float ``[B, T, C, H, W]``, B, T >= 1.

    Args:
        video: what was given.
        frame_size: the ``(H, W)`` that the tower was made for, where it is fixed.
        weight: the first weight that the pixels meet, whose dtype they must have but under
            autocast.
    """
    if not isinstance(video, Tensor):
        raise VideoShapeError(_not_a_tensor(video))
    shape = list(video.shape)
    if video.ndim != 5:
        raise VideoShapeError(
            f"Got a tensor of shape {shape}; expected a video [B, T, C, H, W] (clips, frames, "
            "channels, height, width). Add the missing axis with video[None] (one clip) or "
            "video[:, None] (one frame a clip)."
        )
    if not video.is_floating_point():
        raise VideoShapeError(
            f"Got a video of dtype {str(video.dtype).removeprefix('torch.')}; expected normalised "
            "floating-point frames. Divide by 255, then subtract the mean and divide by the "
            "standard deviation that the model was trained with."
        )
    if weight is not None and video.dtype != weight.dtype:
        _require_autocast(video, weight)
    if shape[0] == 0 or shape[1] == 0:
        empty = "frames (T = 0)" if shape[0] else "clips (B = 0)"
        raise VideoShapeError(f"Got a video without {empty}: shape {shape}.")
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


def _require_autocast(video: Tensor, weight: Tensor) -> None:
    if not torch.is_autocast_enabled(video.device.type):
        given, expected = (str(t.dtype).removeprefix("torch.") for t in (video, weight))
        raise VideoShapeError(
            f"Got a video of dtype {given}; the model's weights are {expected}. Convert it with "
            f"video.to(torch.{expected}), or run the model under torch.autocast."
        )


def _not_a_tensor(video: Any) -> str:
    text = f"Got a {type(video).__name__}"
    if isinstance(video, (list, tuple)):
        lengths = [len(clip) if isinstance(clip, Tensor) and clip.ndim else "?" for clip in video]
        text += f" of {len(lengths)} clips with {', '.join(map(str, lengths))} frames"
    return (
        f"{text}; expected one tensor [B, T, C, H, W]. Stack clips of equal length with "
        "torch.stack; sample or pad clips of different lengths to one length, or batch them by "
        "length."
    )
