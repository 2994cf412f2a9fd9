"""The change of an entry during fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["difference"]


def difference(tuned: Tensor, base: Tensor) -> Tensor:
    """Return ``tuned - base``, with 0 for equal values, also for two equal infinities."""
    delta = tuned - base
    if not bool(torch.isfinite(delta.sum())):
        delta[tuned == base] = 0.0  # for example -inf in both masks
    return delta
