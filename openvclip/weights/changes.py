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
        NonFiniteMergeError: the change holds NaN or infinity. The text is for models without NaN
            and infinity, and names no entry: the caller looks at the models, and adds the name.
    """
    delta = tuned - base
    if may_be_broken(delta):
        delta[tuned == base] = 0.0  # for example -inf in both masks
        if not bool(torch.isfinite(delta).all()):
            raise NonFiniteMergeError(
                f"the change between two models is beyond the range of {delta.dtype}. Leave out "
                "the model with the largest values of this entry."
            )
    return delta
