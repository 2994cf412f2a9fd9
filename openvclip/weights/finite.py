"""The rule for NaN and infinity in merges: which values of the models are refused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from openvclip.errors import NonFiniteMergeError, listed
from openvclip.weights.numerics import computable, finite_probe, is_interpolable

__all__ = ["may_be_broken", "require_finite", "require_same_infinities"]


def may_be_broken(tensor: Tensor) -> bool:
    """Return whether a tensor may hold NaN or infinity; ``False`` is certain.

    If the tensor is in the cache, this takes less time than an addition.
    """
    return is_interpolable(tensor) and not bool(torch.isfinite(finite_probe(tensor)))


def require_finite(name: str, merged: Tensor, values: Sequence[Tensor]) -> None:
    """Refuse a merged entry that is not finite, unless all models hold the same infinities.

    Args:
        name: name of the entry.
        merged: the merged entry.
        values: the entry in each model.

    Raises:
        NonFiniteMergeError: a model holds NaN, or an infinity that not all models hold.
    """
    if may_be_broken(merged):
        require_same_infinities(name, values)


@torch.no_grad()
def require_same_infinities(
    name: str, values: Sequence[Tensor], models: Sequence[str] | None = None
) -> None:
    """Refuse NaN, and infinities that not all models hold in the same place.

    The attention mask of a text tower holds the same infinities in all models.

    Args:
        name: name of the entry.
        values: the entry in each model, on one device, in any dtypes.
        models: names of the models, for the error text. Default: numbers from 0 on.

    Raises:
        NonFiniteMergeError: the rule does not hold. The error names the entry and the models.
    """
    wide = [computable(value) for value in values]
    differ = torch.zeros_like(wide[0], dtype=torch.bool)
    for value in wide:
        differ |= value != wide[0]
        differ |= value.isnan()
    names = models or [f"model {position}" for position in range(len(wide))]
    broken = [
        model
        for model, value in zip(names, wide, strict=True)
        if bool((differ & ~torch.isfinite(value)).any())
    ]
    if broken:
        raise NonFiniteMergeError(
            f"{name} holds NaN or infinity in {listed(broken, 10)}. The merged model would be "
            "useless. Merge other weights. If you trained these weights, look for a learning rate "
            "that is too high or a loss that overflows."
        )
