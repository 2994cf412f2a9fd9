"""Methods that go by the angle between weights: slerp and Model Stock."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from openvclip.errors import MergeError
from openvclip.merging.entries import combined, difference, matched, own
from openvclip.weights.interpolation import Lambda, weights_of, write_interpolated

_PARALLEL = 0.9995  # |cosine| above which slerp is linear, mergekit's threshold
_CHUNK = 1 << 20  # elements that a product in float64 makes a copy of at a time


def slerp(
    theta_a: Mapping[str, Tensor],
    theta_b: Mapping[str, Tensor],
    lam: Lambda,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""Spherical interpolation of each tensor: an arc from ``theta_b`` to ``theta_a``.

    .. math:: \frac{\sin(\lambda\Omega)}{\sin\Omega} a
              + \frac{\sin((1-\lambda)\Omega)}{\sin\Omega} b,
              \qquad \cos\Omega = \frac{a \cdot b}{|a| |b|}

    (Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985), with each tensor taken
    as one vector and not normalised, as in mergekit's ``slerp``. **lam weighs theta_a**, as in
    :func:`openvclip.interpolate`; mergekit's ``t`` is ``1 - lam`` where theta_a is its base.

    Where :math:`|\cos\Omega| > 0.9995` (the tensors point the same way or opposite ways; scalars
    always do) the interpolation is linear, as in mergekit. It is linear too where one of the
    tensors is zero, and so has no direction, or is not finite; there mergekit takes a right angle.

    Args:
        theta_a: state dict of the original model.
        theta_b: state dict of the fine-tuned model: the same names and shapes.
        lam: a number, or a function from an entry's plain name to its number.
        dtype: dtype of the floating-point entries of the result, as in ``interpolate``.

    Returns:
        A new dict in the order of ``theta_b``, on its devices. At ``lam=0`` and ``lam=1`` the
        entries are bitwise those of that end. Integer and boolean entries come from ``theta_b``.

    Raises:
        StateMismatchError, WeightTypeError, LambdaError: as in ``interpolate``.

    Warns:
        ExtrapolationWarning: a weight lies outside [0, 1].
    """
    a, b = matched(theta_a, [theta_b], "theta_a", "theta_b")
    weight_of = weights_of(lam, b)

    def combine(name: str, entries: list[Tensor]) -> Tensor:
        y, x = entries
        share = weight_of[name]
        cosine = math.nan if share in (0.0, 1.0) else _cosine(x, y)
        # Not `> _PARALLEL`: the cosine of what is zero or not finite is NaN.
        if not abs(cosine) <= _PARALLEL:
            result = torch.empty_like(y, memory_format=torch.contiguous_format)
            write_interpolated({name: result}, {name: x}, {name: y}, {name: share})
            return result
        angle = math.acos(cosine)
        of_a = math.sin(share * angle) / math.sin(angle)
        of_b = math.sin((1.0 - share) * angle) / math.sin(angle)
        return (of_a * x).add_(y, alpha=of_b)

    return combined([b, a], combine, dtype)


def model_stock(
    base: Mapping[str, Tensor],
    tuned: Sequence[Mapping[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""Model Stock: the mean of fine-tuned models, drawn towards the original by their angle.

    For each tensor, with :math:`N` fine-tuned models and :math:`\theta` the angle between their
    differences from the original :math:`w_0`:

    .. math:: w = t \bar{w} + (1 - t) w_0,
              \qquad t = \frac{N \cos\theta}{1 + (N - 1) \cos\theta}

    (Jang et al., "Model Stock: All we need is just a few fine-tuned models", ECCV 2024). For more
    than two models :math:`\cos\theta` is the mean of the cosines of all pairs, as in mergekit.

    A ratio outside [0, 1] is no interpolation, so where :math:`\cos\theta \le 0`, when the models
    moved apart, the original is kept. It is also kept where all models left it as it is, and a
    model that did not move a tensor has cosine 0 to the others.

    Args:
        base: state dict of the original model.
        tuned: state dicts of two or more models that were fine-tuned from it.
        dtype: dtype of the floating-point entries of the result; by default the narrowest that
            holds those of all models.

    Returns:
        A new dict in the order of ``base``, on its devices, with its integer entries.

    Raises:
        MergeError: fewer than two fine-tuned models.
        StateMismatchError, WeightTypeError: as in ``interpolate``.
    """
    states = matched(base, tuned)
    if len(tuned) < 2:
        raise MergeError("model_stock needs two or more fine-tuned models, got 1.")

    def combine(_: str, entries: list[Tensor]) -> Tensor:
        start, *ends = entries
        deltas = [difference(end, start) for end in ends]
        cosines = [_cosine(x, y) for x, y in itertools.combinations(deltas, 2)]
        cosine = sum(0.0 if math.isnan(value) else value for value in cosines) / len(cosines)
        count = len(ends)
        ratio = count * cosine / (1.0 + (count - 1) * cosine) if cosine > 0.0 else 0.0
        total = deltas[0]
        for delta in deltas[1:]:
            total += delta
        return start + total.mul_(ratio / count) if ratio else own(start)

    return combined(states, combine, dtype)


def _cosine(x: Tensor, y: Tensor) -> float:
    """The cosine of the angle, in float64; NaN where one is zero or not finite."""
    norms = math.sqrt(_dot(x, x)) * math.sqrt(_dot(y, y))
    if norms == 0.0 or not math.isfinite(norms):
        return math.nan
    return max(-1.0, min(1.0, _dot(x, y) / norms))


def _dot(x: Tensor, y: Tensor) -> float:
    pairs = zip(x.reshape(-1).split(_CHUNK), y.reshape(-1).split(_CHUNK), strict=True)
    parts = [torch.dot(p.double(), q.double()) for p, q in pairs]
    return float(torch.stack(parts).sum()) if parts else 0.0
