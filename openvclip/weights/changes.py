"""The change of an entry during fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from openvclip.errors import NonFiniteMergeError
from openvclip.weights.finite import may_be_broken

__all__ = ["difference"]


def difference(tuned: Tensor, base: Tensor) -> Tensor:
    """Return ``tuned - base``, with 0 for equal values, also for two equal infinities.

    Raises:
        NonFiniteMergeError: the change holds NaN or infinity. The text names no entry and no model:
            the caller knows the names.
    """
    delta = tuned - base
    if may_be_broken(delta):
        delta[tuned == base] = 0.0  # for example -inf in both masks
        if not bool(torch.isfinite(delta).all()):
            raise NonFiniteMergeError("The change of an entry holds NaN or infinity.")
    return delta
