"""Attention over neighbouring frames (Equation 3 of Open-VCLIP), which all towers share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from openvclip.towers.attention_cpu import attend_frame_by_frame
from openvclip.towers.attention_cuda import attend_on_views
from openvclip.towers.attention_kernels import is_on_gpu, kernel_for
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
    options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale}
    if view.window == 0:
        return _attend(q, k, v, **options)
    if is_exporting():
        return _attend_for_export(q, k, v, view, **options)
    if dropout_p == 0.0:
        # Under autocast the dtypes can differ. scaled_dot_product_attention converts them.
        same_dtype = q.dtype == k.dtype == v.dtype
        if same_dtype and _prefers_frame_by_frame(q):
            return attend_frame_by_frame(q, k, v, view, scale).flatten(-2)
        q, k, v = _as_autocast_does(q, k, v)
        kernel = kernel_for(q, k, v)
        if kernel is not None:
            return attend_on_views(q, k, v, view, scale, kernel).flatten(-2)
    if _compiler_has_no_functions():
        return _attend_for_export(q, k, v, view, **options)
    return attend_with_copies(q, k, v, view, **options)


def attend_with_copies(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: FrameView,
    *,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Compute :func:`temporal_attention` by copying the keys and values of the frames in view.

    ``scaled_dot_product_attention`` then computes the attention. Everything it supports is
    supported: all devices and dtypes, dropout, and gradients of gradients.
    """
    options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale}
    if view.boundary == "mask":
        return _attend_inside(q, k, v, view.window, **options)
    return _attend(q, _in_view(k, view), _in_view(v, view), **options)


def _attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Compute attention of each frame's queries over the keys that belong to this frame.

    Args:
        q: queries ``[B, T, N, heads, d]``.
        k: keys ``[B, T, L, heads, d]``, L for each frame.
        v: values ``[B, T, L, heads, d]``.
        options: options of ``scaled_dot_product_attention``.

    Returns:
        Tensor ``[B, T, N, heads * d]``.
    """
    out = functional.scaled_dot_product_attention(_by_head(q), _by_head(k), _by_head(v), **options)
    return out.transpose(1, 2).reshape(*q.shape[:3], q.shape[3] * q.shape[4])


def _attend_inside(q: Tensor, k: Tensor, v: Tensor, window: int, **options: Any) -> Tensor:
    """Compute attention over the frames in view that lie inside the clip, without a mask.

    Frames with the same number of frames in view share one call. Flash attention has no mask, and
    cuDNN's attention with a mask can return NaN gradients (pytorch#196678). So no call has a mask,
    and on a GPU cuDNN's attention is turned off for these calls.
    """
    if is_on_gpu(q):
        with sdpa_kernel(_allowed_without_cudnn()):
            return _attend_groups(q, k, v, window, **options)
    return _attend_groups(q, k, v, window, **options)


def _attend_groups(q: Tensor, k: Tensor, v: Tensor, window: int, **options: Any) -> Tensor:
    groups = _groups(q.shape[1], window)
    queries = q.split([last - first for first, last, _, _ in groups], dim=1)
    keys, values = _GatherInside.apply(k, window), _GatherInside.apply(v, window)
    parts = [
        _attend(a, b.flatten(2, 3), c.flatten(2, 3), **options)
        for a, b, c in zip(queries, keys, values, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _allowed_without_cudnn() -> list[SDPBackend]:
    """Return the kernels that the user did not turn off with ``sdpa_kernel``, without cuDNN's."""
    cuda = torch.backends.cuda
    allowed = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: cuda.math_sdp_enabled(),
    }
    return [kernel for kernel, enabled in allowed.items() if enabled]


def _attend_for_export(q: Tensor, k: Tensor, v: Tensor, view: FrameView, **options: Any) -> Tensor:
    """Compute attention over the frames in view with operations that every export format has.

    The same operations are right for each number of frames, so an exported model can leave the
    number of frames open.
    """
    b, t, n = q.shape[:3]
    mask = _inside_mask(b, t, n, view.window, q.device) if view.boundary == "mask" else None
    k, v = _in_view_for_export(k, view), _in_view_for_export(v, view)
    return _attend(q, k, v, attn_mask=mask, **options)


def _prefers_frame_by_frame(q: Tensor) -> bool:
    """Return whether to call one kernel for each frame instead of one kernel for all frames.

    One kernel for all frames needs copies: each frame gets the keys and values of its neighbours.
    On a CPU these copies cost more than the attention itself. A compiled graph should not contain
    a loop over frames.

    The loop over frames calls a flash kernel. If the user turned the flash kernels off with
    ``sdpa_kernel``, the result is False. PyTorch then chooses another kernel, for example one that
    can be differentiated twice.
    """
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(torch.backends.cuda.flash_sdp_enabled())  # this setting applies to CPUs too


def _as_autocast_does(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convert the inputs to the dtype that autocast gives ``scaled_dot_product_attention``."""
    if not is_on_gpu(q) or not torch.is_autocast_enabled("cuda") or q.dtype == torch.float64:
        return q, k, v  # autocast leaves float64 as it is
    dtype = torch.get_autocast_dtype("cuda")
    return q.to(dtype), k.to(dtype), v.to(dtype)


def is_exporting() -> bool:
    """Return whether PyTorch records the model for another program.

    This is the case in ``torch.jit.trace``, in ``torch.export`` and in both exporters for ONNX. The
    record must not hold a Python function. ``torch.compile`` is not an export.
    """
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    # torch.compile of torch 2.7 takes torch.compiler.is_exporting() for True.
    exporting: bool = torch.compiler._is_exporting_flag
    return tracing or exporting


def _compiler_has_no_functions() -> bool:
    """Return whether ``torch.compile`` does not support the functions below that copy frames.

    The versions of PyTorch with this limit also take ``torch.compiler.is_exporting()`` for True.
    """
    return torch.compiler.is_exporting()


def _by_head(x: Tensor) -> Tensor:
    """``[B, T, L, heads, d]`` to ``[B * T, heads, L, d]``, the layout of the fused kernels."""
    return x.flatten(0, 1).transpose(1, 2)


def _in_view(x: Tensor, view: FrameView) -> Tensor:
    """``[B, T, N, ...]`` to ``[B, T, (2 window + 1) N, ...]``: the frames in view, in order."""
    gathered: Tensor = _GatherFrames.apply(x, view.window, view.boundary == "replicate")
    return gathered.flatten(2, 3)


def _in_view_for_export(x: Tensor, view: FrameView) -> Tensor:
    """Compute :func:`_in_view` with slices and ``torch.cat``."""
    before, after = x[:, :1], x[:, -1:]
    if view.boundary != "replicate":
        before, after = torch.zeros_like(before), torch.zeros_like(after)
    padded = torch.cat([*[before] * view.window, x, *[after] * view.window], dim=1)
    t = x.shape[1]
    return torch.cat([padded[:, i : i + t] for i in range(2 * view.window + 1)], dim=2)


def _inside_mask(b: int, t: int, n: int, window: int, device: torch.device) -> Tensor:
    """Return a mask that is True for keys of frames inside the clip.

    The mask is a bool tensor ``[B * T, 1, 1, (2 window + 1) N]``.
    """
    frames = torch.arange(t, device=device)[:, None]
    frames = frames + torch.arange(-window, window + 1, device=device)
    inside = ((frames >= 0) & (frames < t)).repeat_interleave(n, dim=1)
    return inside.repeat(b, 1)[:, None, None, :]


def _groups(t: int, window: int) -> list[tuple[int, int, int, int]]:
    """Divide the frames of a clip into groups with the same number of frames in view.

    Returns:
        A list of ``(first, last, start, length)``: the frames ``first`` to ``last - 1`` each have
        ``length`` frames in view. In view of ``first`` are the frames from ``start`` on. In view
        of the next frame of the group are the frames from ``start + 1`` on.
    """

    def alone(frame: int) -> tuple[int, int, int, int]:
        start, end = max(0, frame - window), min(t, frame + window + 1)
        return frame, frame + 1, start, end - start

    if t <= 2 * window:
        return [alone(frame) for frame in range(t)]
    before = [(i, i + 1, 0, i + window + 1) for i in range(window)]
    # Lists like this one do not make torch.compile treat the number of frames as a constant.
    after = [(t - i, t - i + 1, t - i - window, i + window) for i in range(window, 0, -1)]
    return [*before, (window, t - window, 0, 2 * window + 1), *after]


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

    generate_vmap_rule = True

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


class _GatherInside(torch.autograd.Function):
    """Gather the frames in view of each frame, without frames outside the clip.

    The results are one tensor ``[B, frames, frames in view, ...]`` for each group of
    :func:`_groups`. The backward pass adds all gradients into one buffer.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, window: int) -> tuple[Tensor, ...]:
        return tuple(
            torch.stack([x[:, start + i : start + i + last - first] for i in range(length)], dim=2)
            for first, last, start, length in _groups(x.shape[1], window)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, ...]) -> None:
        x, ctx.window = inputs
        ctx.t = x.shape[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].new_zeros(grads[0].shape[0], ctx.t, *grads[0].shape[3:])
        for grad, (first, last, start, length) in zip(
            grads, _groups(ctx.t, ctx.window), strict=True
        ):
            for i in range(length):
                total[:, start + i : start + i + last - first] += grad[:, :, i]
        return total, None
