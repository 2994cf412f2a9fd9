"""Merge methods that use the angle between weights: slerp and Model Stock."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from openvclip.errors import MergeError
from openvclip.merging.entries import combined, contiguous_copy, difference, matched
from openvclip.merging.methods import Method
from openvclip.merging.straight_line import LAM
from openvclip.weights.finite import require_finite
from openvclip.weights.interpolation import Lambda, weights_of, write_interpolated
from openvclip.weights.names import is_extra_state
from openvclip.weights.relative import FineTuned

_PARALLEL = 0.9995  # |cosine| above which slerp is linear, as in mergekit
_CHUNK = 1 << 20  # elements that are copied to float64 at a time


def slerp(
    theta_a: Mapping[str, Tensor],
    theta_b: FineTuned,
    lam: Lambda,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""Interpolate each tensor spherically, along an arc from ``theta_b`` to ``theta_a``.

    .. math:: \frac{\sin(\lambda\Omega)}{\sin\Omega} a
              + \frac{\sin((1-\lambda)\Omega)}{\sin\Omega} b,
              \qquad \cos\Omega = \frac{a \cdot b}{|a| |b|}

    (Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.) Each tensor is one
    vector and is not normalised, as in mergekit's ``slerp``. **lam weighs theta_a**, as in
    :func:`openvclip.interpolate`. mergekit's ``t`` is ``1 - lam`` if its base model is theta_a.

    If :math:`|\cos\Omega| > 0.9995`, the interpolation is linear, as in mergekit. The two tensors
    then have nearly the same or nearly opposite directions; this is the case for all scalars. The
    interpolation is also linear if a tensor is zero or holds infinities, because such a tensor has
    no direction. For these tensors mergekit uses a right angle.

    Args:
        theta_a: state dict of the original model.
        theta_b: state dict of the fine-tuned model, with the same names and shapes.
        lam: a number, or a function from the canonical name of an entry to its number.
        dtype: dtype of the floating-point entries of the result, as in
            :func:`openvclip.interpolate`.

    Returns:
        A new dict in the order of ``theta_b``, on its devices. At ``lam=0`` and ``lam=1`` the
        entries equal those of ``theta_b`` and ``theta_a`` bitwise. Integer and boolean entries
        come from ``theta_b``.

    Raises:
        NonFiniteMergeError: a model holds NaN or infinity; see :mod:`openvclip.merging`.
        StateMismatchError, WeightTypeError, LambdaError: as in :func:`openvclip.interpolate`.

    Warns:
        ExtrapolationWarning: a weight lies outside [0, 1].
    """
    states = matched(theta_a, [theta_b], "theta_a", "theta_b")
    a = states[0]
    weight_of = weights_of(lam, {n: value for n, value in a.items() if not is_extra_state(n)})

    def combine(name: str, entries: list[Tensor]) -> Tensor:
        y, x = entries
        weight = weight_of[name]
        cosine = math.nan if weight in (0.0, 1.0) else _cosine(x, y)
        # The cosine of a zero tensor or a tensor with infinities is NaN. Every comparison with NaN
        # is false, so `not ... <= _PARALLEL` is true for NaN, but `> _PARALLEL` would be false.
        if not abs(cosine) <= _PARALLEL:
            result = torch.empty_like(y, memory_format=torch.contiguous_format)
            write_interpolated({name: result}, {name: x}, {name: y}, {name: weight})
            if math.isnan(cosine):
                require_finite(name, result, [y, x])
            return result
        angle = math.acos(cosine)
        factor_a = math.sin(weight * angle) / math.sin(angle)
        factor_b = math.sin((1.0 - weight) * angle) / math.sin(angle)
        return (factor_a * x).add_(y, alpha=factor_b)

    return combined(states[::-1], combine, dtype)


def model_stock(
    base: Mapping[str, Tensor],
    tuned: Sequence[FineTuned],
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""Interpolate between the original model and the mean of fine-tuned models by their angles.

    For each tensor, with :math:`N` fine-tuned models, their mean :math:`\bar{w}`, the original
    :math:`w_0`, and the angle :math:`\theta` between the changes of the fine-tuned models:

    .. math:: w = t \bar{w} + (1 - t) w_0,
              \qquad t = \frac{N \cos\theta}{1 + (N - 1) \cos\theta}

    (Jang et al., "Model Stock: All we need is just a few fine-tuned models", ECCV 2024.) For more
    than two models, :math:`\cos\theta` is the mean of the cosines of all pairs, as in mergekit.

    If :math:`\cos\theta \le 0`, the models moved apart, and :math:`t` is not in (0, 1]. The
    original tensor is then kept. If no model changed a tensor, the original tensor is kept too. If
    a model of a pair did not change a tensor, the cosine of the pair is 0.

    Args:
        base: state dict of the original model.
        tuned: state dicts of two or more models that were fine-tuned from the original model.
        dtype: dtype of the floating-point entries of the result. Default: the narrowest dtype that
            holds the entries of all models.

    Returns:
        A new dict in the order of ``base``, on its devices, with its integer entries.

    Raises:
        MergeError: there are fewer than two fine-tuned models.
        NonFiniteMergeError: a model holds NaN or infinity; see :mod:`openvclip.merging`.
        StateMismatchError, WeightTypeError: as in :func:`openvclip.interpolate`.
    """
    states = matched(base, tuned)
    if len(tuned) < 2:
        raise MergeError(
            "model_stock needs two or more fine-tuned models, got 1. Use interpolate for one model."
        )

    def combine(_: str, entries: list[Tensor]) -> Tensor:
        start, *ends = entries
        deltas = [difference(end, start) for end in ends]
        ratio = _stock_ratio(deltas)
        total = deltas[0]
        for delta in deltas[1:]:
            total += delta
        return start + total.mul_(ratio / len(ends)) if ratio else contiguous_copy(start)

    return combined(states, combine, dtype)


def _stock_ratio(deltas: list[Tensor]) -> float:
    """Return t of Model Stock: the weight of the mean of the fine-tuned models."""
    cosines = [_cosine(x, y) for x, y in itertools.combinations(deltas, 2)]
    cosine = sum(0.0 if math.isnan(value) else value for value in cosines) / len(cosines)
    count = len(deltas)
    return count * cosine / (1.0 + (count - 1) * cosine) if cosine > 0.0 else 0.0


def _cosine(x: Tensor, y: Tensor) -> float:
    """Return the cosine of the angle, in float64. NaN if a tensor is zero or not finite."""
    norms = math.sqrt(_dot(x, x)) * math.sqrt(_dot(y, y))
    if norms == 0.0 or not math.isfinite(norms):
        return math.nan
    return max(-1.0, min(1.0, _dot(x, y) / norms))


def _dot(x: Tensor, y: Tensor) -> float:
    pairs = zip(x.reshape(-1).split(_CHUNK), y.reshape(-1).split(_CHUNK), strict=True)
    parts = [torch.dot(p.double(), q.double()) for p, q in pairs]
    return float(torch.stack(parts).sum()) if parts else 0.0


SLERP = Method(
    "slerp",
    "each tensor on an arc from the model to the original CLIP",
    "Shoemake, SIGGRAPH 1985",
    slerp,
    most=1,
    options=(LAM,),
)

MODEL_STOCK = Method(
    "model_stock",
    "between the original CLIP and the mean, by angles of changes",
    "Jang et al., ECCV 2024",
    model_stock,
    least=2,
)
