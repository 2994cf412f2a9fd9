"""Attention over neighbouring frames (Equation 3 of Open-VCLIP), which all towers share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from openvclip.towers.attention_cpu import attend_frame_by_frame
from openvclip.towers.view import FrameView


def temporal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: FrameView,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Compute attention of each frame's queries over the keys of the frames in view (Equation 3).

    Args:
        q: queries ``[B, T, N, heads, d]``: B clips of T frames with N tokens each.
        k: keys ``[B, T, N, heads, d]``.
        v: values ``[B, T, N, heads, d]``.
        view: the frames in view.
        dropout_p: dropout probability of the attention weights. Default: 0.0.
        scale: factor of the scores. Default: ``1 / sqrt(d)``.

    Returns:
        Tensor ``[B, T, N, heads * d]``.
    """
    b, t, n, heads, d = q.shape
    # Under autocast the dtypes can differ. scaled_dot_product_attention converts them.
    same_dtype = q.dtype == k.dtype == v.dtype
    if view.window > 0 and dropout_p == 0.0 and same_dtype and _prefers_frame_by_frame(q):
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
    """Return whether to call one kernel for each frame instead of one kernel for all frames.

    One kernel for all frames needs copies: each frame gets the keys and values of its neighbours.
    On a CPU these copies cost more than the attention itself. On a GPU few large kernels are
    faster, and a compiled graph should not contain a loop over frames.

    The loop over frames calls a flash kernel. If the user turned the flash kernels off with
    ``sdpa_kernel``, the result is False. PyTorch then chooses another kernel, for example one that
    can be differentiated twice.
    """
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(torch.backends.cuda.flash_sdp_enabled())  # this setting applies to CPUs too


def _by_head(x: Tensor) -> Tensor:
    """``[B, T, L, heads, d]`` to ``[B * T, heads, L, d]``, the layout of the fused kernels."""
    return x.flatten(0, 1).transpose(1, 2)


def _in_view(x: Tensor, view: FrameView) -> Tensor:
    """``[B, T, N, ...]`` to ``[B, T, (2 window + 1) N, ...]``: the frames in view, in order."""
    gathered: Tensor = _GatherFrames.apply(x, view.window, view.boundary == "replicate")
    return gathered.flatten(2, 3)


def _inside_mask(b: int, t: int, n: int, window: int, device: torch.device) -> Tensor:
    """Return a mask that is True for keys of frames inside the clip.

    The mask is a bool tensor ``[B * T, 1, 1, (2 window + 1) N]``.
    """
    frames = torch.arange(t, device=device)[:, None]
    frames = frames + torch.arange(-window, window + 1, device=device)
    inside = ((frames >= 0) & (frames < t)).repeat_interleave(n, dim=1)
    return inside.repeat(b, 1)[:, None, None, :]


def _shifts(t: int, window: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield ``(slot, offset, first, last)`` for each offset from ``-window`` to ``window``.

    ``slot`` counts the offsets from 0. The neighbour ``frame + offset`` lies inside the clip if
    ``first <= frame < last``.
    """
    for slot, offset in enumerate(range(-window, window + 1)):
        first = min(max(0, -offset), t)
        yield slot, offset, first, max(first, min(t, t - offset))


class _GatherFrames(torch.autograd.Function):
    """Gather each frame with its neighbours: ``[B, T, ...]`` to ``[B, T, 2 window + 1, ...]``.

    The backward pass adds all gradients into one buffer. With slices and ``torch.cat``, autograd
    would allocate one zero-filled gradient for each slice.
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
