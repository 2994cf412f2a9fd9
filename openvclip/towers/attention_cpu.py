"""Attention over neighbouring frames on a CPU: one kernel call a frame, on views."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from openvclip.towers.view import FrameView

# The kernels behind scaled_dot_product_attention on a CPU. Unlike that function they give and
# take the logarithm of each query's sum of exponentials, which is what lets attention be put
# together from parts.
_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_frame_by_frame(
    q: Tensor, k: Tensor, v: Tensor, view: FrameView, scale: float | None
) -> Tensor:
    """Attention of each frame's queries over the keys of the frames in view (Equation 3).

    Keys and values are copied only where end frames are repeated or a layout has no flat view of
    frames and tokens; zero keys are never multiplied. The backward pass takes the memory of its
    results and of one frame's parts; it sums the queries' gradient in float32 for half dtypes.

    Args:
        q: queries ``[B, T, N, heads, d]``, on a CPU.
        k: keys, same shape.
        v: values, same shape.
        view: the frames in view.
        scale: factor of the scores; ``1 / sqrt(d)`` by default.

    Returns:
        ``[B, T, N, heads, d]``.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, _ = _FrameByFrame.apply(q, k, v, view, scale)
    return out  # type: ignore[no-any-return]


class _FrameByFrame(torch.autograd.Function):
    """The forward pass goes by the frames of the queries, the backward pass by those of the keys.

    The logarithm of a query's sum over all its keys turns scores into shares, whichever part of
    the keys is looked at. So the backward pass can take the keys of one frame together with the
    queries of all frames that see it: gradients of keys and values come out whole, frame by frame,
    and only those of the queries are added up.
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, view: FrameView, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        t = q.shape[1]
        out = q.new_empty(q.shape)
        sums = []
        for i in range(t):
            first, last = _seen(i, t, view)
            keys, values = (_rows(_with_repeated_ends(x, i, view)) for x in (k, v))
            frame, log_sum = _forward_kernel(_rows(q[:, i : i + 1]), keys, values, scale=scale)
            outside = 2 * view.window + 1 - (last - first)
            if view.boundary == "zero" and outside > 0:
                # A zero key has the score 0, and its zero value adds nothing to the result.
                total = log_sum.logaddexp(log_sum.new_tensor(math.log(outside * q.shape[2])))
                frame = frame * (log_sum - total).exp()[..., None]
                log_sum = total
            out[:, i] = frame.transpose(1, 2)
            sums.append(log_sum)
        return out, torch.stack(sums, dim=2)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, FrameView, float | None], output: Any
    ) -> None:
        *tensors, ctx.view, ctx.scale = inputs
        out, log_sums = output
        ctx.mark_non_differentiable(log_sums)
        ctx.save_for_backward(*tensors, out, log_sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        t, wide = q.shape[1], torch.promote_types(q.dtype, torch.float32)
        of_q, of_k, of_v = (
            q.new_zeros(q.shape, dtype=wide),
            k.new_empty(k.shape),
            v.new_empty(v.shape),
        )
        for j in range(t):
            first, last = _seen(j, t, ctx.view)  # who sees a frame is whom it sees
            of_queries, of_keys, of_values = _backward_kernel(
                _rows(grad[:, first:last]),
                _rows(q[:, first:last]),
                _rows(k[:, j : j + 1]),
                _rows(v[:, j : j + 1]),
                _rows(out[:, first:last]),
                _log_sums_for(log_sums, j, ctx.view),
                0.0,
                False,
                scale=ctx.scale,
            )
            of_q[:, first:last] += of_queries.transpose(1, 2).unflatten(1, (last - first, -1))
            of_k[:, j], of_v[:, j] = of_keys.transpose(1, 2), of_values.transpose(1, 2)
        return of_q.to(q.dtype), of_k, of_v, None, None


def _seen(frame: int, t: int, view: FrameView) -> tuple[int, int]:
    """The frames of the clip in view of one, as a range."""
    return max(0, frame - view.window), min(t, frame + view.window + 1)


def _rows(x: Tensor) -> Tensor:
    """``[B, frames, N, heads, d]`` to ``[B, heads, frames * N, d]``, the layout of the kernels."""
    return x.flatten(1, 2).transpose(1, 2)


def _with_repeated_ends(x: Tensor, frame: int, view: FrameView) -> Tensor:
    """The frames in view of one; where ends are replicated, as often as they are seen."""
    t = x.shape[1]
    first, last = _seen(frame, t, view)
    inside = x[:, first:last]
    if view.boundary != "replicate" or last - first == 2 * view.window + 1:
        return inside
    before, after = max(0, view.window - frame), max(0, frame + view.window + 1 - t)
    return torch.cat([*[x[:, :1]] * before, inside, *[x[:, -1:]] * after], dim=1)


def _log_sums_for(log_sums: Tensor, key_frame: int, view: FrameView) -> Tensor:
    """The logarithms ``[B, heads, queries]`` for the queries that see a frame.

    A key that is seen m times has m times the share, as if the sum were smaller by that factor.
    """
    t, w = log_sums.shape[2], view.window
    first, last = _seen(key_frame, t, view)
    chosen = log_sums[:, :, first:last]
    if view.boundary == "replicate" and key_frame in (0, t - 1):
        times = []
        for i in range(first, last):
            before = max(0, w - i) if key_frame == 0 else 0
            after = max(0, i + w + 1 - t) if key_frame == t - 1 else 0
            times.append(math.log(1 + before + after))
        chosen = chosen - chosen.new_tensor(times)[:, None]
    return chosen.flatten(2)
