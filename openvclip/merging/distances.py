"""Distances between models in weight space."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from openvclip.errors import MergeError
from openvclip.merging.entries import interpolable_entries
from openvclip.merging.task_arithmetic import task_vector
from openvclip.weights.numerics import device_for_float64
from openvclip.weights.relative import FineTuned
from openvclip.weights.shards import whole


def lam_of_same_distance(
    base: Mapping[str, Tensor], tuned: FineTuned, merged: Mapping[str, Tensor]
) -> float:
    r"""Return the λ whose plain interpolation is as far from ``base`` as a merged model is.

    .. math:: \lambda = 1 - \frac{\|W_\text{merged} - W_0\|}{\|W_1 - W_0\|}

    The norm is over all floating-point entries. A merge that shrinks the change of a fine-tuned
    model, such as :func:`monosoup`, gains by the shrinking alone. To see what else it gains,
    compare it with ``interpolate(base, tuned, lam_of_same_distance(base, tuned, merged))``.

    Args:
        base: state dict of the original model.
        tuned: state dict of the fine-tuned model.
        merged: state dict of the merged model.

    Returns:
        λ, the weight of ``base``. It is negative if ``merged`` is farther away than ``tuned``.

    Raises:
        MergeError: ``tuned`` equals ``base``, or a change is not finite.
        StateMismatchError, WeightTypeError: as in :func:`openvclip.interpolate`.
    """
    whole_change, change = _norm(base, tuned), _norm(base, merged)
    if whole_change == 0.0 or not math.isfinite(change / whole_change):
        raise MergeError(
            f"The fine-tuned model is {whole_change:g} and the merged model {change:g} away from "
            "base; expected finite distances, and a fine-tuned model that differs from base."
        )
    return 1.0 - change / whole_change


@torch.no_grad()
def _norm(base: Mapping[str, Tensor], tuned: FineTuned) -> float:
    change = interpolable_entries(task_vector(base, tuned))
    return math.hypot(*(float(_wide(whole(value)).norm()) for value in change.values()))


def _wide(value: Tensor) -> Tensor:
    """Return the values in double precision, on a device that has it."""
    wide = torch.complex128 if value.is_complex() else torch.float64
    return value.to(device_for_float64(value.device)).to(wide)
