"""The attention operations of PyTorch for NVIDIA GPUs, emulated on a CPU.

The functions have the signatures of the operations in ``torch.ops.aten``. They check what the real
operations check, and more: the layouts that the real kernels read without a check. Outputs and
log-sum-exps have the layouts of the real results. The arithmetic is that of float64.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from openvclip.towers import attention, attention_kernels

Grads = tuple[Tensor, Tensor, Tensor]


def use_emulated_kernel(monkeypatch: Any, name: str) -> None:
    """Let ``temporal_attention`` take the path of GPUs on a CPU, with an emulated kernel."""
    operations = {
        "_flash_attention_forward": flash_forward,
        "_flash_attention_backward": flash_backward,
        "_efficient_attention_forward": efficient_forward,
        "_efficient_attention_backward": efficient_backward,
    }
    assert all(hasattr(torch.ops.aten, operation) for operation in operations)
    monkeypatch.setattr(attention_kernels, "_aten", SimpleNamespace(**operations))
    monkeypatch.setattr(attention, "kernel_for", lambda q, k, v: name)
    monkeypatch.setattr(attention, "_prefers_frame_by_frame", lambda q: False)
    assert name in attention_kernels.KERNELS


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: None,
    cum_seq_k: None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    assert cum_seq_q is None
    assert cum_seq_k is None
    assert dropout_p == 0.0
    assert is_causal is False
    assert return_debug_mask is False
    _require(query, key, value, max_q, max_k)
    out, log_sums = _attend(query, key, value, scale)
    rng_state, unused = (torch.zeros(size, dtype=torch.uint64) for size in (2, ()))
    return torch.empty_like(query).copy_(out), log_sums.float(), rng_state, unused, out.new_empty(0)


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: None,
    cum_seq_k: None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
) -> Grads:
    assert cum_seq_q is None
    assert cum_seq_k is None
    assert dropout_p == 0.0
    assert is_causal is False
    assert (rng_state.dtype, rng_state.shape) == (torch.uint64, (2,))
    assert (unused.dtype, unused.shape) == (torch.uint64, ())
    _require(query, key, value, max_q, max_k)
    n, tokens, heads, _ = query.shape
    assert logsumexp.shape == (n, heads, tokens)
    return _differentiate(grad_out, query, key, value, out, logsumexp, scale)


def efficient_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    cu_seqlens_q: None,
    cu_seqlens_k: None,
    max_seqlen_q: None,
    max_seqlen_k: None,
    dropout_p: float,
    custom_mask_type: int,
    compute_log_sumexp: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    assert {bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k} == {None}
    assert (dropout_p, custom_mask_type) == (0.0, 0)
    max_q, max_k = query.shape[1], key.shape[1]
    _require(query, key, value, max_q, max_k)
    out, log_sums = _attend(query, key, value, scale)
    rows = math.ceil(max_q / 32) * 32 if compute_log_sumexp else 0
    padded = torch.full((*log_sums.shape[:2], rows), torch.inf)
    if compute_log_sumexp:
        padded[..., :max_q] = log_sums
    seed, offset = (torch.zeros((), dtype=torch.int64) for _ in range(2))
    return out.to(query.dtype).contiguous(), padded, seed, offset, max_q, max_k


def efficient_backward(
    grad_out_: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: None,
    out: Tensor,
    cu_seqlens_q: None,
    cu_seqlens_k: None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    logsumexp: Tensor,
    dropout_p: float,
    philox_seed: Tensor,
    philox_offset: Tensor,
    custom_mask_type: int,
    bias_requires_grad: bool,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert {bias, cu_seqlens_q, cu_seqlens_k} == {None}
    assert (dropout_p, custom_mask_type, bias_requires_grad) == (0.0, 0, False)
    assert philox_seed.dtype == philox_offset.dtype == torch.int64
    _require(query, key, value, max_seqlen_q, max_seqlen_k)
    n, tokens, heads, _ = query.shape
    assert logsumexp.shape == (n, heads, math.ceil(tokens / 32) * 32)
    assert (logsumexp[..., tokens:] == torch.inf).all()  # padding must get no weight
    assert out.is_contiguous()
    grads = _differentiate(grad_out_, query, key, value, out, logsumexp, scale)
    return (*(x.contiguous() for x in grads), torch.empty(()))  # type: ignore[return-value]


# --- what both have in common ------------------------------------------------------------------


def _require(query: Tensor, key: Tensor, value: Tensor, max_q: int, max_k: int) -> None:
    n, tokens, heads, d = query.shape
    assert n > 0
    assert tokens == max_q
    assert key.shape == value.shape == (n, max_k, heads, d)
    assert query.dtype == key.dtype == value.dtype
    for x in (query, key, value):
        *outer, last = x.stride()
        assert last == 1
        for start in (*outer, x.storage_offset()):
            assert start * x.element_size() % 16 == 0, "not aligned"


def _scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.einsum("nqhd,nkhd->nhqk", query.double(), key.double()) * scale


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> tuple[Tensor, ...]:
    scores = _scores(query, key, scale)
    out = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(dim=-1), value.double())
    return out, scores.logsumexp(dim=-1)


def _differentiate(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    scale: float | None,
) -> Grads:
    """The gradients by the equations of FlashAttention-2, with the log-sum-exps of the caller."""
    assert logsumexp.dtype == torch.float32
    assert logsumexp.is_contiguous()
    assert grad_out.shape == out.shape == query.shape
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, o, do = (x.double() for x in (query, key, value, out, grad_out))
    log_sums = logsumexp[..., : query.shape[1], None].double()
    weights = (_scores(query, key, scale) - log_sums).exp()
    delta = (o * do).sum(-1).transpose(1, 2).unsqueeze(-1)
    grad_scores = weights * (torch.einsum("nqhd,nkhd->nhqk", do, v) - delta) * factor
    grads = (
        torch.einsum("nhqk,nkhd->nqhd", grad_scores, k),
        torch.einsum("nhqk,nqhd->nkhd", grad_scores, q),
        torch.einsum("nhqk,nqhd->nkhd", weights, do),
    )
    inputs = query, key, value
    gq, gk, gv = (torch.empty_like(x).copy_(g) for x, g in zip(inputs, grads, strict=True))
    return gq, gk, gv
