"""Attention over neighbouring frames on a GPU: kernel calls on views of the keys and values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openvclip.towers.attention_kernels import KERNELS, Kernel
from openvclip.towers.view import FrameView


def attend_on_views(
    q: Tensor, k: Tensor, v: Tensor, view: FrameView, scale: float | None, kernel: str
) -> Tensor:
    """Compute attention of each frame's queries over the keys of the frames in view (Equation 3).

    Keys and values are copied in two cases only: for the frames at the ends of a clip with the
    boundary ``"replicate"``, and if the memory layout of a tensor is not supported by the kernels.
    With the boundary ``"zero"``, the zero keys outside the clip are not multiplied, because their
    scores are 0. For the backward pass, ``q``, ``k``, ``v``, the result and one number for each
    query and head are kept.

    Args:
        q: queries ``[B, T, N, heads, d]``.
        k: keys ``[B, T, N, heads, d]``.
        v: values ``[B, T, N, heads, d]``.
        view: the frames in view.
        scale: factor of the scores. None means ``1 / sqrt(d)``.
        kernel: name of the kernel in :data:`~openvclip.towers.attention_kernels.KERNELS`.

    Returns:
        Tensor ``[B, T, N, heads, d]``.
    """
    if torch.compiler.is_compiling():
        out, _ = _compiled_forward(q, k, v, view.window, view.boundary, scale, kernel)
    else:
        out, _ = _OnViews.apply(q, k, v, view, scale, kernel)
    return out  # type: ignore[no-any-return]


# --- the passes --------------------------------------------------------------------------------


def _forward(
    q: Tensor, k: Tensor, v: Tensor, view: FrameView, scale: float | None, kernel: Kernel
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, T, N, heads, d]`` and the log-sum-exps ``[T, B, heads, L]``."""
    out, log_sums = _empty_results(q, kernel)
    q, k, v = (_ready(x) for x in (q, k, v))
    for part in parts_of(q.shape[0], q.shape[1], view):
        attended, log_sum = kernel.forward(part.queries(q), part.keys(k), part.keys(v), scale)
        if view.boundary == "zero" and part.n_outside > 0:
            # A zero key has the score 0, and its zero value adds nothing to the output.
            n_zero_keys = part.n_outside * q.shape[2]
            total = torch.logaddexp(log_sum, log_sum.new_full((), math.log(n_zero_keys)))
            weight = (log_sum - total).narrow(2, 0, q.shape[2]).exp().transpose(1, 2).unsqueeze(-1)
            torch.mul(attended, weight, out=part.queries(out))
            log_sum = total
        else:
            part.queries(out).copy_(attended)
        part.log_sums(log_sums).copy_(log_sum)
    return out, log_sums


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    view: FrameView,
    scale: float | None,
    kernel: Kernel,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``q``, ``k`` and ``v``.

    The kernels compute attention weights from the scores and the log-sum-exp over all keys of a
    query. So the zero keys outside the clip are not needed here either.
    """
    grad, q, k, v = (_ready(x) for x in (grad, q, k, v))
    grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
    grad_k, grad_v = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    for part in parts_of(q.shape[0], q.shape[1], view):
        part_q, part_k, part_v = kernel.backward(
            part.queries(grad),
            part.queries(q),
            part.keys(k),
            part.keys(v),
            part.queries(out),
            part.log_sums(log_sums).contiguous(),
            scale,
        )
        part.queries(grad_q).copy_(part_q)
        part.add_keys(grad_k, part_k)
        part.add_keys(grad_v, part_v)
    return grad_q, grad_k, grad_v


def _empty_results(q: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    n_clips, n_frames, n_tokens, n_heads, _ = q.shape
    length = kernel.log_sum_length(n_tokens)
    return q.new_empty(q.shape), q.new_empty(
        (n_frames, n_clips, n_heads, length), dtype=torch.float32
    )


class _OnViews(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        view: FrameView,
        scale: float | None,
        kernel: str,
    ) -> tuple[Tensor, Tensor]:
        out, log_sums = _forward(q, k, v, view, scale, KERNELS[kernel])
        ctx.mark_non_differentiable(log_sums)
        ctx.save_for_backward(q, k, v, out, log_sums)
        ctx.options = view, scale, KERNELS[kernel]
        return out, log_sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        return (*_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None)


# --- the parts of a batch that one kernel call computes ----------------------------------------


def parts_of(n_clips: int, n_frames: int, view: FrameView) -> Sequence[OneFrame | InnerFrames]:
    """Divide the frames of a batch into parts, one for each kernel call.

    A part is one frame of all clips, or all inner frames of one clip. A frame is an inner frame if
    all frames in its view lie inside the clip. The division with fewer calls is returned.
    """
    window = view.window
    frames = range(n_frames)
    if n_clips + 2 * window >= n_frames:
        return [OneFrame(frame, n_frames, view) for frame in frames]
    ends = [*frames[:window], *frames[n_frames - window :]]
    inner = [InnerFrames(clip, n_frames, view) for clip in range(n_clips)]
    return [*inner, *(OneFrame(frame, n_frames, view) for frame in ends)]


@dataclass(frozen=True)
class OneFrame:
    """The queries of one frame of all clips, and the keys of the frames in view."""

    frame: int
    n_frames: int
    view: FrameView

    @property
    def n_outside(self) -> int:
        """Number of the frames in view that lie outside the clip."""
        first, last = self._inside
        return 2 * self.view.window + 1 - (last - first)

    def queries(self, x: Tensor) -> Tensor:
        """Return the queries ``[B, N, heads, d]`` in a tensor ``[B, T, N, heads, d]``."""
        return x.select(1, self.frame)

    def log_sums(self, x: Tensor) -> Tensor:
        """Return the log-sum-exps ``[B, heads, L]`` in a tensor ``[T, B, heads, L]``."""
        return x.select(0, self.frame)

    def keys(self, x: Tensor) -> Tensor:
        """Return the keys ``[B, frames N, heads, d]`` in a tensor ``[B, T, N, heads, d]``."""
        first, last = self._inside
        before, after = self._repeats
        inside = x.narrow(1, first, last - first)
        if before + after > 0:
            ends = x.narrow(1, 0, 1), x.narrow(1, self.n_frames - 1, 1)
            inside = torch.cat([*[ends[0]] * before, inside, *[ends[1]] * after], dim=1)
        return inside.flatten(1, 2)

    def add_keys(self, total: Tensor, part: Tensor) -> None:
        """Add a gradient of :meth:`keys` to the gradient ``total`` ``[B, T, N, heads, d]``."""
        first, last = self._inside
        before, after = self._repeats
        length = last - first
        part = part.unflatten(1, (before + length + after, -1))
        total.narrow(1, first, length).add_(part.narrow(1, before, length))
        for repeat in range(before):
            total.select(1, 0).add_(part.select(1, repeat))
        for repeat in range(before + length, before + length + after):
            total.select(1, -1).add_(part.select(1, repeat))

    @property
    def _inside(self) -> tuple[int, int]:
        """``(first, last)``: frames ``first`` to ``last - 1`` of the clip are in view."""
        window = self.view.window
        return max(0, self.frame - window), min(self.n_frames, self.frame + window + 1)

    @property
    def _repeats(self) -> tuple[int, int]:
        """How often the first and the last frame of the clip are repeated."""
        if self.view.boundary != "replicate":
            return 0, 0
        window = self.view.window
        return max(0, window - self.frame), max(0, self.frame + window + 1 - self.n_frames)


@dataclass(frozen=True)
class InnerFrames:
    """The queries of all inner frames of one clip. The keys of these frames overlap."""

    clip: int
    n_frames: int
    view: FrameView
    n_outside = 0

    def queries(self, x: Tensor) -> Tensor:
        """Return the queries ``[frames, N, heads, d]`` in a tensor ``[B, T, N, heads, d]``."""
        return x.select(0, self.clip).narrow(0, *self._inner)

    def log_sums(self, x: Tensor) -> Tensor:
        """Return the log-sum-exps ``[frames, heads, L]`` in a tensor ``[T, B, heads, L]``."""
        return x.select(1, self.clip).narrow(0, *self._inner)

    def keys(self, x: Tensor) -> Tensor:
        """Return the keys ``[frames, (2 window + 1) N, heads, d]``, a view of ``x``."""
        windows = x.select(0, self.clip).unfold(
            0, self._width, 1
        )  # [frames, N, heads, d, 2 window + 1]
        return windows.movedim(-1, 1).flatten(1, 2)

    def add_keys(self, total: Tensor, part: Tensor) -> None:
        """Add a gradient of :meth:`keys` to the gradient ``total`` ``[B, T, N, heads, d]``."""
        part = part.unflatten(1, (self._width, -1))
        total = total.select(0, self.clip)
        for start in range(self._width):
            total.narrow(0, start, part.shape[0]).add_(part.select(1, start))

    @property
    def _width(self) -> int:
        return 2 * self.view.window + 1

    @property
    def _inner(self) -> tuple[int, int]:
        """The first inner frame and the number of inner frames."""
        return self.view.window, self.n_frames - 2 * self.view.window


def _ready(x: Tensor) -> Tensor:
    """Return ``x``, or a copy if the kernels do not support the memory layout of ``x``.

    The frames of a clip must lie one after the other, and each vector of a head must begin at a
    multiple of 16 bytes.
    """
    *outer, last = x.stride()
    in_turn = x.shape[1] == 1 or x.stride(1) == x.shape[2] * x.stride(2)
    starts = (*outer, x.storage_offset())
    aligned = all(start * x.element_size() % 16 == 0 for start in starts)
    fits = last == 1 and in_turn and aligned
    return x if fits else x.clone(memory_format=torch.contiguous_format)


# --- torch.compile -----------------------------------------------------------------------------

# A compiled graph has one operation instead of the calls for each part. So the graph does not
# depend on the number of clips or frames.


_OPTIONS = "int window, str boundary, float? scale, str kernel"


@torch.library.custom_op(
    "openvclip::temporal_attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _compiled_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    boundary: str,
    scale: float | None,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    view = FrameView(window, boundary)  # type: ignore[arg-type]
    return _forward(q, k, v, view, scale, KERNELS[kernel])


@_compiled_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    boundary: str,
    scale: float | None,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    return _empty_results(q, KERNELS[kernel])


_SAVED = "Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sums"


@torch.library.custom_op(
    "openvclip::temporal_attention_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_SAVED}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _compiled_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    window: int,
    boundary: str,
    scale: float | None,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    view = FrameView(window, boundary)  # type: ignore[arg-type]
    return _backward(grad, q, k, v, out, log_sums, view, scale, KERNELS[kernel])


@_compiled_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return q, k, v


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    grads = _compiled_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads, None, None, None, None)


_compiled_forward.register_autograd(_differentiate, setup_context=_keep)
