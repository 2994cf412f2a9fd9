"""Arithmetic on weights: dtypes, finiteness, interpolation in place, temporary overwriting.

Half precision is computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from openvclip.weights.shards import any_process, local

foreach = cast(Any, torch)
"""``torch`` as the home of the ``_foreach_*`` functions, which carry no type annotations."""


def is_interpolable(tensor: Tensor) -> bool:
    """Whether arithmetic on the entry means something: floating point and complex entries."""
    return tensor.is_floating_point() or tensor.is_complex()


def memory_of(tensor: Tensor) -> tuple[torch.device, int]:
    """Where this process keeps the tensor's values; the same for tensors that share memory."""
    part = local(tensor)
    return part.device, part.untyped_storage().data_ptr()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for arithmetic on weights stored as ``dtype``: never less than float32."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def common_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The narrowest dtype that holds both without loss (float32 where only float32 does)."""
    return a if a == b else torch.promote_types(compute_dtype(a), compute_dtype(b))


def non_finite_names(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the entries that hold NaN or infinity.

    One number of each entry is looked at first, all together; entries are looked at one by one
    only where one of these is not finite. Of sharded entries each process looks at its own part,
    and all of them get the same names.
    """
    own = {name: local(value) for name, value in state.items() if is_interpolable(value)}
    if not any_process([not all_finite(_probes(list(own.values())))], state.values())[0]:
        return []
    broken = [not bool(torch.isfinite(value).all()) for value in own.values()]
    broken = any_process(broken, state.values())
    return [name for name, is_broken in zip(own, broken, strict=True) if is_broken]


def finite_probe(tensor: Tensor) -> Tensor:
    """A real number that is not finite where the tensor holds one that is not.

    It may overflow where all are finite, so that a closer look has to follow.
    """
    if tensor.is_complex():
        return tensor.sum().abs()
    if tensor.dtype != compute_dtype(tensor.dtype) and tensor.numel():
        low, high = torch.aminmax(tensor)  # a sum in float32 would make a copy of half precision
        return high.float() - low.float()
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        flat, half = tensor.view(-1), (tensor.numel() + 1) // 2
        return flat[:half].dot(flat[-half:])  # quicker there than a sum
    return tensor.sum()


def all_finite(probes: Iterable[Tensor]) -> bool:
    """Whether every :func:`finite_probe` is finite in float32; each device is waited for once."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for value in probes:
        by_device.setdefault(value.device, []).append(value.float())
    return all(bool(torch.isfinite(torch.stack(group)).all()) for group in by_device.values())


def _probes(tensors: list[Tensor]) -> list[Tensor]:
    """One for each tensor; on a GPU by few kernels, where the tensors are of one dtype."""
    if all(tensor.device.type == "cpu" or not tensor.numel() for tensor in tensors):
        return [finite_probe(tensor) for tensor in tensors]
    return list(foreach._foreach_norm([t for t in tensors if t.numel()], float("inf")))


@torch.no_grad()
def lerp_(live: list[Tensor], towards: list[Tensor], weight: float) -> None:
    """``live <- weight * towards + (1 - weight) * live``, rounded once, at the end.

    Args:
        live: tensors to overwrite.
        towards: tensors of the same shapes, of any dtypes, on any devices.
        weight: how far to go.
    """
    pairs = list(zip(live, towards, strict=True))
    if all((t.device, t.dtype) == (own.device, own.dtype) for own, t in pairs):
        foreach._foreach_lerp_(live, towards, weight)  # computes half precision in float32
        return
    for own, other in pairs:
        wide = common_dtype(own.dtype, other.dtype)
        # The allocator gives the memory of one copy to the next, in the stream's order.
        there = other.to(own.device, non_blocking=other.is_pinned()).to(wide)
        if own.dtype == wide:
            foreach._foreach_lerp_([own], [there], weight)
        else:
            own.copy_(torch.lerp(own.to(wide), there, weight))


@contextmanager
def overwriting(live: list[Tensor], stash: list[Tensor] | None = None) -> Iterator[None]:
    """Within the block ``live`` may be overwritten; afterwards it holds bitwise what it held.

    Args:
        live: tensors that are views of a model's weights (detached, so that autograd's version
            counters see the writes and refuse a backward pass through weights that changed).
        stash: tensors to keep the values in, one for each of ``live``, on any device; made where
            not given.
    """
    with torch.no_grad():
        if stash is None:
            stash = [torch.empty_like(tensor) for tensor in live]
        # Copies between a GPU and page-locked memory need not be waited for: the GPU does them
        # in the order of its stream, so before and after all that is done to the weights.
        free = all(tensor.is_pinned() for tensor in stash)
        foreach._foreach_copy_(stash, live, non_blocking=free)
    try:
        # Inside an autocast region PyTorch keeps half-precision copies of the weights, which
        # would outlive the change of the weights that they were made from.
        torch.clear_autocast_cache()
        yield
    finally:
        with torch.no_grad():
            foreach._foreach_copy_(live, stash, non_blocking=free)
        torch.clear_autocast_cache()
