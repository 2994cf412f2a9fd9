"""The attention kernels of PyTorch that return and accept the log-sum-exp of each query's scores.

``scaled_dot_product_attention`` runs these kernels. Called directly, they also return the
log-sum-exp, and their backward pass accepts any log-sum-exp. Keys and values can be views, also
views that overlap. The layout of queries, keys and values is ``[n, tokens, heads, d]``.

cuDNN's kernel is not in the table. On H100 and H200 its backward pass can return NaN for some
lengths (pytorch#196678, cudnn-frontend#1072).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_WIDEST_HEAD = 192  # some GPUs have no backward pass of the flash kernel for wider heads
_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Kernel:
    """An attention kernel.

    Attributes:
        name: the name in :data:`KERNELS`.
        forward: takes ``(q, k, v, scale)`` and returns the output ``[n, tokens, heads, d]`` and the
            log-sum-exps ``[n, heads, L]``.
        backward: takes ``(grad, q, k, v, out, log_sums, scale)`` and returns the gradients of
            ``q``, ``k`` and ``v``.
        log_sum_block: L is the number of queries, rounded up to a multiple of this number.
    """

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    log_sum_block: int = 1

    def log_sum_length(self, n_queries: int) -> int:
        """Return the length L of the log-sum-exps of ``n_queries`` queries."""
        return -(-n_queries // self.log_sum_block) * self.log_sum_block


def choose_kernel(
    *,
    dtype: torch.dtype,
    head_dim: int,
    capability: int,
    flash: bool,
    efficient: bool,
) -> str | None:
    """Return the name of the kernel for an NVIDIA GPU, or None if no kernel supports the input.

    If both kernels support the input, the flash kernel is chosen, as
    ``scaled_dot_product_attention`` does. ``python -m tests.benchmarks.attention_kernels``
    measures both on a GPU.

    Args:
        dtype: dtype of queries, keys and values.
        head_dim: width of a head.
        capability: compute capability of the GPU, 90 for 9.0.
        flash: whether the flash kernel can be used.
        efficient: whether the memory-efficient kernel can be used.
    """
    if head_dim == 0 or head_dim > _WIDEST_HEAD:
        return None
    recent = capability >= 80
    if flash and recent and dtype in _HALF and head_dim % 8 == 0:
        return "flash"
    supported = dtype in (torch.float16, torch.float32) or (dtype == torch.bfloat16 and recent)
    if efficient and supported and head_dim * dtype.itemsize % 16 == 0:
        return "efficient"
    return None


def kernel_for(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return the name of the kernel for queries, keys and values, or None if there is none.

    None stands for ``scaled_dot_product_attention`` on copies. This is the case on other devices
    than NVIDIA GPUs, for dtypes that no kernel supports, for empty tensors, and in transforms of
    ``torch.func``. It is also the case if the user turned the kernels off with ``sdpa_kernel``, for
    example because a kernel can't be differentiated twice.
    """
    if not is_on_gpu(q) or not q.dtype == k.dtype == v.dtype:
        return None
    if min(q.shape) == 0 or (not torch.compiler.is_compiling() and _in_functional_transform()):
        return None
    capability, flash, efficient = _abilities(q.device.index or 0)
    return choose_kernel(
        dtype=q.dtype,
        head_dim=q.shape[-1],
        capability=capability,
        flash=flash,
        efficient=efficient,
    )


def is_on_gpu(x: Tensor) -> bool:
    """Return whether a tensor is on a GPU of NVIDIA or AMD."""
    return x.device.type == "cuda"


def _abilities(index: int) -> tuple[int, bool, bool]:
    """Return the compute capability of a GPU, and which of the two kernels can be used."""
    if torch.version.hip is not None:  # the kernels of ROCm have other log-sum-exps
        return 0, False, False
    cuda = torch.backends.cuda
    flash = cuda.is_flash_attention_available() and cuda.flash_sdp_enabled()
    return capability_of(index), flash, cuda.mem_efficient_sdp_enabled()


def capability_of(index: int) -> int:
    """Return the compute capability of a GPU as a number: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


# torch.compile calls _abilities once and treats the result as a constant, as PyTorch's own
# attention does with the settings of ``sdpa_kernel``. The mark is that of
# torch.compiler.assume_constant_result, which would import torch.compile here: 3 seconds.
_abilities._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _in_functional_transform() -> bool:
    return bool(torch._C._are_functorch_transforms_active())


# --- the flash kernel --------------------------------------------------------------------------


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    out, log_sums, *_ = _aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, False, False, scale=scale
    )
    return out, log_sums


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # Without dropout the kernel does not read the state of the random number generator.
    rng_state, unused = (q.new_empty(size, dtype=torch.uint64) for size in (2, ()))
    lengths = q.shape[1], k.shape[1]
    grads: tuple[Tensor, Tensor, Tensor] = _aten._flash_attention_backward(
        *(grad, q, k, v, out, log_sums, None, None, *lengths, 0.0, False, rng_state, unused),
        scale=scale,
    )
    return grads


# --- the memory-efficient kernel ---------------------------------------------------------------

_NO_MASK = 0


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    out, log_sums, *_ = _aten._efficient_attention_forward(
        q, k, v, None, None, None, None, None, 0.0, _NO_MASK, True, scale=scale
    )
    return out, log_sums


def _efficient_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sums: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    # Without dropout the kernel does not read the state of the random number generator.
    seed, offset = (q.new_empty((), dtype=torch.int64) for _ in range(2))
    lengths = q.shape[1], k.shape[1]
    # The kernel supports one layout of the output only: contiguous.
    inputs = grad, q, k, v, None, out.contiguous(), None, None, *lengths, log_sums
    grads = _aten._efficient_attention_backward(
        *inputs, 0.0, seed, offset, _NO_MASK, False, scale=scale
    )
    return grads[0], grads[1], grads[2]


KERNELS: dict[str, Kernel] = {
    "flash": Kernel("flash", _flash_forward, _flash_backward),
    "efficient": Kernel("efficient", _efficient_forward, _efficient_backward, log_sum_block=32),
}
