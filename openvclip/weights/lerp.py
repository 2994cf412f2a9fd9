"""Linear interpolation of tensors at the speed of ``torch.lerp``, right for infinities too."""

from __future__ import annotations

import weakref
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from openvclip.weights.numerics import are_finite, compute_dtype, finite_probe
from openvclip.weights.shards import is_sharded

Lerp: TypeAlias = tuple[Tensor, Tensor, Tensor, float]
"""``(out, a, b, lam)``, where all tensors have the same shape, dtype and device."""

_PIECE = 2**19  # elements; such a piece is still in the cache when it is checked
_ELEMENTS = 4  # of a tensor, which show changes that PyTorch does not record


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
    each tensor: then all pairs are checked again. A write of this kind to a few elements is not
    noticed: if it puts equal infinities into both tensors, the result is NaN.
    """
    checked: list[tuple[Lerp, list[Lerp]]] = []
    probes: list[Tensor] = []
    known = _known_pairs(jobs)
    for position, job in enumerate(jobs):
        out, a, b, lam = job
        if position in known:
            torch.lerp(b, a, lam, out=out)
            continue
        pieces = _in_pieces(job)
        for piece_out, piece_a, piece_b, _ in pieces:
            torch.lerp(piece_b, piece_a, lam, out=piece_out)
            probes.append(finite_probe(piece_out))  # while the piece is in the cache
        checked.append((job, pieces))
    finite = iter(are_finite(probes))
    for (_, a, b, _), pieces in checked:
        broken = [piece for piece, is_finite in zip(pieces, finite, strict=False) if not is_finite]
        for piece in broken:
            _use_plain_formula(piece)
        if not broken:
            _remember(a, b)


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
        x, y = a[broken].to(wide_dtype), b[broken].to(wide_dtype)
        plain = lam * x + (1.0 - lam) * y
        # For lam outside [0, 1], two equal infinities have different signs in the sum.
        out[broken] = torch.where(x == y, y, plain).to(out.dtype)


class _Side(NamedTuple):
    """One tensor of a pair, and what identifies its values.

    Attributes:
        tensor: the tensor.
        address: address of the memory.
        version: number of the changes that PyTorch recorded.
        places: how many elements are compared, and the step from one to the next.
        elements: copies of these elements.
    """

    tensor: weakref.ref[Tensor]
    address: int
    version: int
    places: tuple[int, int]
    elements: Tensor

    def is_of(self, tensor: Tensor) -> bool:
        """Return whether this is the tensor, with the memory and the changes of then."""
        return (
            self.tensor() is tensor
            and tensor.data_ptr() == self.address
            and tensor._version == self.version
        )


_known: dict[int, tuple[_Side, _Side]] = {}
"""Pairs a, b whose difference is finite, by ``id(b)``. A pair is removed when b is freed."""


def _known_pairs(jobs: list[Lerp]) -> set[int]:
    """Return the positions of jobs with 0 <= λ <= 1 whose pair is remembered and unchanged."""
    found: set[int] = set()
    now: list[Tensor] = []
    then: list[Tensor] = []
    for position, (_, a, b, lam) in enumerate(jobs):
        pair = _known.get(id(b))
        if pair is None or not (0.0 <= lam <= 1.0 and pair[0].is_of(a) and pair[1].is_of(b)):
            continue
        found.add(position)
        now += (_elements_at(pair[0].places, a), _elements_at(pair[1].places, b))
        then += (pair[0].elements, pair[1].elements)
    if not found:
        return found
    # One comparison of all elements takes a quarter of the time of one for each tensor. Autocast
    # can't join tensors of a half precision that is not its own.
    with torch.autocast("cpu", enabled=False):
        return found if torch.equal(torch.cat(now), torch.cat(then)) else set()


def _remember(a: Tensor, b: Tensor) -> None:
    if torch.compiler.is_compiling() or not (_can_be_remembered(a) and _can_be_remembered(b)):
        return
    key, known = id(b), _known  # at the end of Python the name _known is gone before some tensors
    of_b = weakref.ref(b, lambda _: known.pop(key, None))
    known[key] = _side(a, weakref.ref(a)), _side(b, of_b)


def _side(tensor: Tensor, reference: weakref.ref[Tensor]) -> _Side:
    places = min(_ELEMENTS, tensor.numel()), max(1, tensor.numel() // _ELEMENTS)
    elements = _elements_at(places, tensor).clone()
    return _Side(reference, tensor.data_ptr(), tensor._version, places, elements)


def _elements_at(places: tuple[int, int], tensor: Tensor) -> Tensor:
    number, step = places
    return tensor.as_strided((number,), (step,))


def _can_be_remembered(tensor: Tensor) -> bool:
    """Return whether a change of the tensor can be noticed without waiting for a device.

    Tensors of the inference mode do not count changes.
    """
    if is_sharded(tensor) or tensor.is_inference() or tensor.device.type != "cpu":
        return False
    return tensor.is_contiguous() and tensor.is_floating_point()
