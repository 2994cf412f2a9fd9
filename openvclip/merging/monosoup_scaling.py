"""MonoSoup: scale the strong and the weak directions of the change of one fine-tuned model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from openvclip.errors import MergeError
from openvclip.merging.entries import combined, contiguous_copy, difference, matched
from openvclip.merging.methods import Method, Option
from openvclip.merging.singular import as_matrix, directions
from openvclip.weights.finite import require_finite
from openvclip.weights.relative import FineTuned

_UNCHANGED = 1e-6  # ||D|| / ||W0|| below which a matrix counts as unchanged, as in the paper's code

Rule = Literal["variance", "freevariance"]


def monosoup(
    base: Mapping[str, Tensor],
    tuned: FineTuned,
    *,
    rule: Rule = "variance",
    threshold: float = 0.8,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""Shrink the weak directions of the change of one fine-tuned model (MonoSoup).

    The method (arXiv 2602.09689) needs one model and no data. The change of a matrix is
    :math:`D = W_1 - W_0 = U S V^T`. The first :math:`k` singular triplets are
    :math:`D_\text{high}`, all others are :math:`D_\text{low}`:

    .. math:: W = W_0 + (1 - l) D_\text{high} + l D_\text{low},
              \qquad l = \rho + (1 - \rho) \sqrt{1 - P},
              \qquad \rho = (s_{k+1} / s_1)^2

    :math:`P` is the share of :math:`\sum_j s_j^2` that the first :math:`k` singular values hold,
    and :math:`\rho` is 0 if no direction is left.

    The result is nearer to the original model than the fine-tuned model is. To see whether the
    directions matter, compare it with a plain interpolation at the same distance; see
    :func:`lam_of_same_distance`.

    A matrix is an entry of two or more dimensions, reshaped to ``[rows, rest]``. This includes
    convolutions and projections. Entries of fewer dimensions, and matrices whose change has less
    than a millionth of the norm of the original, are those of the fine-tuned model.

    Args:
        base: state dict of the original model.
        tuned: state dict of the fine-tuned model.
        rule: how many directions are strong. ``"variance"``: the smallest :math:`k` with
            :math:`P \ge` ``threshold``. ``"freevariance"``: :math:`k = \lceil \exp(H(p)) \rceil`
            with the entropy :math:`H` of :math:`p = s / \sum_j s_j`; ``threshold`` is not used.
        threshold: share of the squared singular values, in (0, 1]. At 1 the result is the
            fine-tuned model, bitwise if ``dtype`` holds its entries.
        dtype: dtype of the floating-point entries of the result. Default: the narrowest dtype that
            holds the entries of both models.

    Returns:
        A new dict in the order of ``base``, on its devices, with its integer entries.

    Raises:
        MergeError: a setting is out of range, ``tuned`` is a list, or the decomposition of a matrix
            did not converge.
        NonFiniteMergeError: a model holds NaN or infinity; see :mod:`openvclip.merging`.
        StateMismatchError, WeightTypeError: as in :func:`openvclip.interpolate`.
    """
    if rule not in ("variance", "freevariance"):
        raise MergeError(f"rule={rule!r}: expected 'variance' or 'freevariance'.")
    if not 0.0 < threshold <= 1.0:
        raise MergeError(f"threshold={threshold!r}: expected a share in (0, 1].")
    if isinstance(tuned, (list, tuple)):
        raise MergeError(
            f"monosoup takes one fine-tuned model, got a list of {len(tuned)}. Use iso_c, "
            "tsv_merge or average for several models."
        )
    keeps_all = rule == "variance" and threshold == 1.0
    states = matched(base, [tuned], what_others="tuned")

    def combine(name: str, entries: list[Tensor]) -> Tensor:
        start, end = entries
        if states[0][name].dim() < 2 or keeps_all:
            for entry in entries:
                require_finite(name, entry, entries)
            return contiguous_copy(end)
        delta = difference(end, start)
        # Equal infinities, as in a mask, are part of both models and of no change.
        size = float(start.nan_to_num(0.0, 0.0, 0.0).double().norm())
        if float(delta.double().norm()) < max(_UNCHANGED * size, 1e-300):
            return contiguous_copy(end)
        change = _shrunk(as_matrix(delta), name, rule, threshold)
        return start + change.reshape(start.shape).to(start.dtype)

    return combined(states, combine, dtype)


def _shrunk(delta: Tensor, name: str, rule: Rule, threshold: float) -> Tensor:
    parts = directions(delta, name)
    shares = parts.values.square()
    shares = shares / shares.sum()
    if rule == "variance":
        count = int((shares.cumsum(0) < threshold).sum()) + 1
    else:
        p = parts.values / parts.values.sum()
        count = math.ceil(math.exp(-float((p * p.log()).sum())))
    count = min(count, len(shares))
    rest = max(0.0, float(shares[count:].sum()))  # 1 - P, without the rounding of a difference
    ratio = float(parts.values[count] / parts.values[0]) ** 2 if count < len(shares) else 0.0
    low = ratio + (1.0 - ratio) * math.sqrt(rest)
    # (1 - low) * D_high + low * D_low, with D_low = D - D_high
    return low * delta.double() + (1.0 - 2.0 * low) * parts.first(count).matrix()


MONOSOUP = Method(
    "monosoup",
    "MonoSoup: shrink the weak directions of the change of one model",
    "arXiv 2602.09689, 2026",
    monosoup,
    most=1,
    options=(
        Option(
            "rule",
            "how many directions are strong",
            str,
            default="variance",
            choices=("variance", "freevariance"),
        ),
        Option(
            "threshold",
            "share of the squared singular values of the strong directions, in (0, 1]",
            default=0.8,
        ),
    ),
    unused={"threshold": ("rule", "freevariance")},
)
