"""The arithmetic of merges of files: a part of an entry, or a whole entry, at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from openvclip.checkpoints.streaming.inputs import WeightInput
from openvclip.errors import NonFiniteWeightsError, WeightTypeError, listed
from openvclip.weights.numerics import is_interpolable

Merge: TypeAlias = Callable[[list[dict[str, Tensor]]], Mapping[str, Tensor]]
"""A merge method: maps a list of state dicts, one for each model, to one state dict.

All state dicts have the same names.
"""


class Mean:
    """The mean over the inputs, with sums in float64."""

    def __init__(self, inputs: list[WeightInput]) -> None:
        self._inputs = inputs

    def __call__(self, name: str, values: list[Tensor], results: list[Tensor]) -> None:
        """Compute a part of an entry, see ``Compute``."""
        last = values[-1]
        if not is_interpolable(last):
            results[0].copy_(last)
            return
        wide = torch.complex128 if last.is_complex() else torch.float64
        total = values[0].to(wide, copy=True)
        addend = torch.empty_like(total)
        for value in values[1:]:
            total.add_(addend.copy_(value))  # twice as fast as adding a tensor of another dtype
        mean = total.div_(len(values))
        if not bool(torch.isfinite(mean.sum())):
            self._require_same_infinities(name, values, mean)
        results[0].copy_(mean)

    def _require_same_infinities(self, name: str, values: list[Tensor], mean: Tensor) -> None:
        non_finite = ~torch.isfinite(mean)
        if all(bool((value[non_finite] == mean[non_finite]).all()) for value in values):
            return
        files = [
            str(source.path)
            for source, value in zip(self._inputs, values, strict=True)
            if not bool(torch.isfinite(value).all())
        ]
        raise NonFiniteWeightsError(
            f"{name} holds NaN or infinity in {listed(files)}. The mean would hold it too. Leave "
            "that file out. Look for a learning rate that is too high or a loss that overflows."
        )


def apply_merge(
    merge: Merge,
    sizes: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    name: str,
    values: list[Tensor],
    results: list[Tensor],
) -> None:
    """Compute one entry with a merge method, see ``Compute``."""
    shape, result = sizes[name].shape, results[0]
    merged = merge([{name: value.view(shape)} for value in values])
    entry = merged.get(name) if isinstance(merged, Mapping) and len(merged) == 1 else None
    if not isinstance(entry, Tensor):
        raise WeightTypeError(
            f"The method gave {str(merged)[:200]}; expected {{{name!r}: tensor}}."
        )
    if entry.shape != shape or (dtype is None and entry.dtype != result.dtype):
        raise WeightTypeError(
            f"The method gave {name} as {entry.dtype} of shape {list(entry.shape)}; expected "
            f"{result.dtype} of shape {list(shape)}."
        )
    result.copy_(entry.detach().reshape(-1))
