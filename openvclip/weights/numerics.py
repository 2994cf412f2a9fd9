"""Arithmetic on weights: dtypes, finite values, interpolation in place, temporary values.

Values of 8 and 16 bits are computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from openvclip.weights.shards import any_process, is_sharded, local

foreach = cast(Any, torch)
"""``torch`` without types: the ``_foreach_*`` functions have no type annotations."""


def is_interpolable(tensor: Tensor) -> bool:
    """Return whether the tensor has a floating-point or complex dtype."""
    return tensor.is_floating_point() or tensor.is_complex()


def memory_of(tensor: Tensor) -> tuple[torch.device, int]:
    """Return the device and the address of the memory that holds this process's values.

    Tensors that share memory have the same result.
    """
    part = local(tensor) if is_sharded(tensor) else tensor
    return part.device, part.untyped_storage().data_ptr()


def bytes_of(flat: Tensor) -> memoryview:
    """Return the memory of a contiguous one-dimensional tensor on the CPU."""
    return flat.view(torch.uint8).numpy().data


def bits_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, flat. Values with equal bits are equal, NaN included."""
    # Some small dtypes have no kernels for comparisons of their values.
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for arithmetic on weights of ``dtype``: at least float32 or complex64."""
    if dtype == torch.complex32:
        return torch.complex64
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def has_kernels(dtype: torch.dtype) -> bool:
    """Return whether PyTorch computes with this dtype itself. It only stores float8 values."""
    return dtype.itemsize > 1 and dtype != torch.complex32


def computable(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy in a wider dtype if PyTorch does not compute with its dtype."""
    return tensor if has_kernels(tensor.dtype) else tensor.to(compute_dtype(tensor.dtype))


def common_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """Return the narrowest dtype that holds the values of both dtypes without loss.

    The result for float16 and bfloat16 is float32.
    """
    return a if a == b else torch.promote_types(compute_dtype(a), compute_dtype(b))


def dtype_of_result(own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which an entry is stored if floating-point entries get ``dtype``.

    Complex entries keep their dtype, because a real dtype can't hold the imaginary part.

    Args:
        own: the dtype of the entry without ``dtype``: floating-point or complex.
        dtype: the dtype for floating-point entries, or ``None``.
    """
    return own if dtype is None or (own.is_complex and not dtype.is_complex) else dtype


def device_for_float64(device: torch.device) -> torch.device:
    """Return the device, or the CPU if the device has no float64, as Apple's have not."""
    return torch.device("cpu") if device.type == "mps" else device


def non_finite_names(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of entries that hold NaN or infinity.

    First, one probe value is computed for each entry, and all probes are checked together. Only if
    a probe is not finite, each entry is checked by itself. Each process checks its own shards, and
    all processes return the same names.
    """
    parts = {name: local(value) for name, value in state.items() if is_interpolable(value)}
    if not any_process([not all_finite(_probes(list(parts.values())))], state.values())[0]:
        return []
    broken = [not bool(torch.isfinite(computable(part)).all()) for part in parts.values()]
    broken = any_process(broken, state.values())
    return [name for name, is_broken in zip(parts, broken, strict=True) if is_broken]


def finite_probe(tensor: Tensor) -> Tensor:
    """Return a real scalar that is not finite if a value of the tensor is not finite.

    The scalar can also overflow for finite values. If the scalar is not finite, check each value.
    """
    tensor = computable(tensor)
    if tensor.is_complex():
        return tensor.sum().abs()
    if tensor.dtype != compute_dtype(tensor.dtype) and tensor.numel():
        low, high = torch.aminmax(tensor)  # a sum in float32 would copy half-precision values
        return high.float() - low.float()
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        flat = tensor.view(-1)
        return flat.dot(flat)  # on a CPU faster than a sum
    return tensor.sum()


def all_finite(probes: Iterable[Tensor]) -> bool:
    """Return whether all probes are finite in float32, with one synchronisation per device."""
    return all(are_finite(list(probes)))


def are_finite(probes: Sequence[Tensor]) -> list[bool]:
    """Return which probes are finite in float32, with one synchronisation per device."""
    by_device: dict[torch.device, list[int]] = {}
    for position, probe in enumerate(probes):
        by_device.setdefault(probe.device, []).append(position)
    result = [True] * len(probes)
    for positions in by_device.values():
        together = torch.isfinite(torch.stack([probes[i].float() for i in positions])).tolist()
        for position, is_finite in zip(positions, together, strict=True):
            result[position] = is_finite
    return result


def _probes(tensors: list[Tensor]) -> list[Tensor]:
    """Return one probe per tensor. On a GPU, tensors of one dtype share a few kernels."""
    if all(tensor.device.type == "cpu" or not tensor.numel() for tensor in tensors):
        return [finite_probe(tensor) for tensor in tensors]
    return list(foreach._foreach_norm([computable(t) for t in tensors if t.numel()], float("inf")))


@torch.no_grad()
def copy_all(
    targets: Iterable[Tensor], sources: Iterable[Tensor], *, non_blocking: bool = False
) -> None:
    """Copy each source to its target, in one call of PyTorch for each pair of dtypes.

    On a GPU, PyTorch 2.7 to 2.10 read the dtype of the first target for all targets of a call
    (pytorch#173383), and no version copies lists of float8_e8m0fnu or complex32.
    """
    pairs: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        some, others = pairs.setdefault((target.dtype, source.dtype), ([], []))
        some.append(target)
        others.append(source)
    for dtypes, (some, others) in pairs.items():
        if all(map(has_kernels, dtypes)):
            foreach._foreach_copy_(some, others, non_blocking=non_blocking)
            continue
        for target, source in zip(some, others, strict=True):
            target.copy_(source, non_blocking=non_blocking)


@torch.no_grad()
def lerp_(live: list[Tensor], towards: list[Tensor], weight: float) -> None:
    """Overwrite ``live`` with ``weight * towards + (1 - weight) * live``, rounded once.

    Args:
        live: tensors that are overwritten.
        towards: tensors of the same shapes, of any dtypes, on any devices.
        weight: weight of ``towards``.
    """
    pairs = list(zip(live, towards, strict=True))
    same = all((a.device, a.dtype) == (b.device, b.dtype) for a, b in pairs)
    if same and all(has_kernels(target.dtype) for target in live):
        foreach._foreach_lerp_(live, towards, weight)  # computes half precision in float32
        return
    for target, source in pairs:
        wide_dtype = common_dtype(target.dtype, source.dtype)
        wide_dtype = wide_dtype if has_kernels(wide_dtype) else compute_dtype(wide_dtype)
        # Only one wide copy exists at a time. The allocator reuses its memory safely, because all
        # kernels run on one stream.
        wide = source.to(target.device, non_blocking=source.is_pinned()).to(wide_dtype)
        if target.dtype == wide_dtype:
            foreach._foreach_lerp_([target], [wide], weight)
        else:
            target.copy_(torch.lerp(target.to(wide_dtype), wide, weight))


@contextmanager
def overwriting(live: list[Tensor], stash: list[Tensor] | None = None) -> Iterator[None]:
    """Restore the values of ``live`` bitwise after the block, which may overwrite them.

    Each process keeps and restores its own shards. The memory of the weights can change inside the
    block. For example, in PyTorch 2.7 and 2.8 the first forward pass under ``fully_shard`` moves
    uneven shards to padded memory. The local parts of ``live`` are therefore taken again after the
    block. Code inside the block must also call :func:`openvclip.weights.shards.local` at each
    write.

    Autograd's version counters record the writes to the weights, so autograd refuses a backward
    pass through weights that were overwritten.

    Args:
        live: parameters and buffers of a model, plain or sharded. Pass the tensors of the model,
            neither their local parts nor detached views: a view does not follow the weights to
            other memory.
        stash: plain tensors in which the local parts are kept during the block, one for each tensor
            of ``live``, on any device. Default: new tensors.
    """
    with torch.no_grad():
        parts = [local(tensor) for tensor in live]
        if stash is None:
            stash = [torch.empty_like(part) for part in parts]
        # Copies between a GPU and page-locked memory are asynchronous. The GPU runs all work in the
        # order of its stream. The copy to the stash therefore ends before the weights change, and
        # the copy back starts after the last change.
        asynchronous = all(tensor.is_pinned() for tensor in stash)
        copy_all(stash, parts, non_blocking=asynchronous)
        del parts  # memory that the block replaces must be freed
    try:
        # Inside an autocast region PyTorch caches half-precision copies of the weights. The cached
        # copies must not be used for other values of the weights.
        torch.clear_autocast_cache()
        yield
    finally:
        with torch.no_grad():
            parts = [local(tensor) for tensor in live]
            copy_all(parts, stash, non_blocking=asynchronous)
        torch.clear_autocast_cache()
