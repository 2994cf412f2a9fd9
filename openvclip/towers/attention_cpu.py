"""Attention over neighbouring frames on a CPU: one kernel call for each frame, without copies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from openvclip.towers.view import FrameView

# scaled_dot_product_attention runs these kernels on a CPU. In contrast to that function, the
# kernels return and accept the log-sum-exp of each query's scores. The log-sum-exp makes it
# possible to compute attention part by part.
_forward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_frame_by_frame(
    q: Tensor, k: Tensor, v: Tensor, view: FrameView, scale: float | None
) -> Tensor:
    """Compute attention of each frame's queries over the keys of the frames in view (Equation 3).

    Keys and values are copied in two cases only: with the boundary ``"replicate"``, and if their
    memory layout does not allow a view with frames and tokens on one axis. With the boundary
    ``"zero"``, the zero keys outside the clip are not multiplied, because their scores are 0.
    Beside its results, the backward pass needs memory for one frame only. The gradient of
    half-precision queries is summed in float32.

    Args:
        q: queries ``[B, T, N, heads, d]`` on a CPU.
        k: keys ``[B, T, N, heads, d]``.
        v: values ``[B, T, N, heads, d]``.
        view: the frames in view.
        scale: factor of the scores. None means ``1 / sqrt(d)``.

    Returns:
        Tensor ``[B, T, N, heads, d]``.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out, _ = _FrameByFrame.apply(q, k, v, view, scale)
    return out  # type: ignore[no-any-return]


class _FrameByFrame(torch.autograd.Function):
    """Attention with a loop over frames in each pass.

    The forward pass loops over the frames of the queries, the backward pass over the frames of the
    keys. Given the log-sum-exp over all keys of a query, attention weights can be computed for any
    part of these keys. So one step of the backward pass takes the keys of one frame and the queries
    of all frames that attend to this frame. It gives the complete gradient of these keys and
    values. Only the gradient of the queries is a sum over steps.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, view: FrameView, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        n_frames = q.shape[1]
        out = q.new_empty(q.shape)
        log_sums = []
        for frame in range(n_frames):
            first, last = _frames_in_view(frame, n_frames, view)
            keys, values = (_flat(_with_repeated_ends(x, frame, view)) for x in (k, v))
            attended, log_sum = _forward_kernel(
                _flat(q[:, frame : frame + 1]), keys, values, scale=scale
            )
            n_outside = 2 * view.window + 1 - (last - first)
            if view.boundary == "zero" and n_outside > 0:
                # A zero key has the score 0, and its zero value adds nothing to the output.
                n_zero_keys = n_outside * q.shape[2]
                total = log_sum.logaddexp(log_sum.new_tensor(math.log(n_zero_keys)))
                attended = attended * (log_sum - total).exp()[..., None]
                log_sum = total
            out[:, frame] = attended.transpose(1, 2)
            log_sums.append(log_sum)
        return out, torch.stack(log_sums, dim=2)

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
        n_frames = q.shape[1]
        grad_q = q.new_zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32))
        grad_k, grad_v = k.new_empty(k.shape), v.new_empty(v.shape)
        for frame in range(n_frames):
            # Visibility is symmetric: the frames in view of a frame also attend to that frame.
            first, last = _frames_in_view(frame, n_frames, ctx.view)
            part_q, part_k, part_v = _backward_kernel(
                _flat(grad[:, first:last]),
                _flat(q[:, first:last]),
                _flat(k[:, frame : frame + 1]),
                _flat(v[:, frame : frame + 1]),
                _flat(out[:, first:last]),
                _log_sums_for(log_sums, frame, ctx.view),
                0.0,
                False,
                scale=ctx.scale,
            )
            grad_q[:, first:last] += part_q.transpose(1, 2).unflatten(1, (last - first, -1))
            grad_k[:, frame] = part_k.transpose(1, 2)
            grad_v[:, frame] = part_v.transpose(1, 2)
        return grad_q.to(q.dtype), grad_k, grad_v, None, None


def _frames_in_view(frame: int, n_frames: int, view: FrameView) -> tuple[int, int]:
    """Return ``(first, last)``: frames ``first`` to ``last - 1`` of the clip are in view."""
    return max(0, frame - view.window), min(n_frames, frame + view.window + 1)


def _flat(x: Tensor) -> Tensor:
    """``[B, frames, N, heads, d]`` to ``[B, heads, frames * N, d]``, the layout of the kernels."""
    return x.flatten(1, 2).transpose(1, 2)


def _with_repeated_ends(x: Tensor, frame: int, view: FrameView) -> Tensor:
    """Return ``x`` at the frames in view of ``frame``.

    With the boundary ``"replicate"`` the first and the last frame of the clip are repeated for
    the frames in view that lie outside the clip.
    """
    n_frames = x.shape[1]
    first, last = _frames_in_view(frame, n_frames, view)
    inside = x[:, first:last]
    if view.boundary != "replicate" or last - first == 2 * view.window + 1:
        return inside
    n_before = max(0, view.window - frame)
    n_after = max(0, frame + view.window + 1 - n_frames)
    return torch.cat([*[x[:, :1]] * n_before, inside, *[x[:, -1:]] * n_after], dim=1)


def _log_sums_for(log_sums: Tensor, key_frame: int, view: FrameView) -> Tensor:
    """Return the log-sum-exps ``[B, heads, queries]`` of the queries that attend to a frame.

    With the boundary ``"replicate"`` a query can attend to the first or the last frame m times. The
    keys of this frame then get m times the attention weight. Since ``m exp(score - log_sum)`` is
    ``exp(score - (log_sum - log m))``, the function subtracts ``log m`` from the log-sum-exp.
    """
    n_frames, window = log_sums.shape[2], view.window
    first, last = _frames_in_view(key_frame, n_frames, view)
    selected = log_sums[:, :, first:last]
    if view.boundary == "replicate" and key_frame in (0, n_frames - 1):
        log_counts = []
        for frame in range(first, last):
            n_before = max(0, window - frame) if key_frame == 0 else 0
            n_after = max(0, frame + window + 1 - n_frames) if key_frame == n_frames - 1 else 0
            log_counts.append(math.log(1 + n_before + n_after))
        selected = selected - selected.new_tensor(log_counts)[:, None]
    return selected.flatten(2)
