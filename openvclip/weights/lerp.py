"""Linear interpolation of tensors at the speed of ``torch.lerp``, right for infinities too."""

from __future__ import annotations

import weakref
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from openvclip.weights.numerics import all_finite, compute_dtype, finite_probe
from openvclip.weights.shards import is_sharded

Lerp: TypeAlias = tuple[Tensor, Tensor, Tensor, float]
"""``(out, a, b, lam)``, where all tensors have the same shape, dtype and device."""

_PIECE = 2**19  # elements; such a piece is still in the cache when it is checked
_ELEMENTS = 8  # of a tensor, which show changes that PyTorch does not record


def lerp(jobs: list[Lerp]) -> None:
    """Compute ``out <- lam * a + (1 - lam) * b``. Equal values of a and b stay bitwise the same.

    ``torch.lerp`` keeps equal values, needs no temporary tensor and computes half precision in
    float32. It uses ``a - b``, which is not finite for the ``-inf`` of masks or if the difference
    overflows. For such values the plain formula is used. One scalar per piece
    (:func:`finite_probe`) shows whether the piece may hold such values. All scalars are checked
    together, with one synchronisation per device.

    In a sweep over λ, the same pairs of tensors are interpolated many times. A pair whose result
    was finite once has a finite difference, so its results for all λ in [0, 1] are finite. On a CPU
    such pairs are remembered. They are checked again if one of the tensors changed. Changes that
    PyTorch does not record (fused optimizers, ``.data``, NumPy) are noticed by some elements of
    each tensor. A write of this kind to a few elements is not noticed: if it puts equal infinities
    into both tensors, the result is NaN.
    """
    checked: list[tuple[Lerp, list[Lerp], list[Tensor]]] = []
    for job in jobs:
        out, a, b, lam = job
        if 0.0 <= lam <= 1.0 and _is_known(a, b):
            torch.lerp(b, a, lam, out=out)
            continue
        pieces, probes = _in_pieces(job), []
        for piece_out, piece_a, piece_b, _ in pieces:
            torch.lerp(piece_b, piece_a, lam, out=piece_out)
            probes.append(finite_probe(piece_out))  # while the piece is in the cache
        checked.append((job, pieces, probes))
    if all_finite(probe for _, _, probes in checked for probe in probes):
        for (_, a, b, _), _, _ in checked:
            _remember(a, b)
        return
    for _, pieces, _ in checked:
        for piece in pieces:
            _use_plain_formula(piece)


def _in_pieces(job: Lerp) -> list[Lerp]:
    """Split a large tensor on the CPU into pieces that fit the cache."""
    *tensors, lam = job
    out = tensors[0]
    if out.device.type != "cpu" or out.numel() <= _PIECE:
        return [job]
    if not all(tensor.is_contiguous() for tensor in tensors):
        return [job]
    parts = (tensor.view(-1).split(_PIECE) for tensor in tensors)
    return [(x, y, z, lam) for x, y, z in zip(*parts, strict=True)]


def _use_plain_formula(job: Lerp) -> None:
    """Compute the values that are not finite once more, without ``a - b``."""
    out, a, b, lam = job
    if out.is_complex():  # the product of a number and a complex infinity is NaN
        out, a, b = (torch.view_as_real(value.resolve_conj()) for value in (out, a, b))
    broken = ~torch.isfinite(out)
    if bool(broken.any()):
        wide_dtype = compute_dtype(out.dtype)
        plain = lam * a[broken].to(wide_dtype) + (1.0 - lam) * b[broken].to(wide_dtype)
        out[broken] = plain.to(out.dtype)


class _Values(NamedTuple):
    """What identifies the values of a tensor.

    Attributes:
        address: address of the memory.
        version: number of the changes that PyTorch recorded.
        elements: some elements.
    """

    address: int
    version: int
    elements: list[float]


class _Pair(NamedTuple):
    """Two tensors whose difference is finite."""

    a: weakref.ref[Tensor]
    b: weakref.ref[Tensor]
    values_a: _Values
    values_b: _Values


_known: dict[int, _Pair] = {}
"""The remembered pairs, by ``id(b)``. A pair is removed when its ``b`` is freed."""


def _is_known(a: Tensor, b: Tensor) -> bool:
    pair = _known.get(id(b))
    if pair is None or pair.b() is not b or pair.a() is not a:
        return False
    return _values(a) == pair.values_a and _values(b) == pair.values_b


def _remember(a: Tensor, b: Tensor) -> None:
    if torch.compiler.is_compiling() or not (_can_be_remembered(a) and _can_be_remembered(b)):
        return
    key, known = id(b), _known  # at the end of Python the name _known is gone before some tensors
    of_b = weakref.ref(b, lambda _: known.pop(key, None))
    known[key] = _Pair(weakref.ref(a), of_b, _values(a), _values(b))


def _values(tensor: Tensor) -> _Values:
    step = max(1, tensor.numel() // _ELEMENTS)
    elements = tensor.as_strided((min(_ELEMENTS, tensor.numel()),), (step,)).tolist()
    return _Values(tensor.data_ptr(), tensor._version, elements)


def _can_be_remembered(tensor: Tensor) -> bool:
    """Return whether a change of the tensor can be noticed without waiting for a device.

    Tensors of the inference mode do not count changes.
    """
    if is_sharded(tensor) or tensor.is_inference() or tensor.device.type != "cpu":
        return False
    return tensor.is_contiguous() and tensor.is_floating_point()
