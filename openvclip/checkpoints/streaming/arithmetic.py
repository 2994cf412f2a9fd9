"""The arithmetic of merges of files: a part of an entry, or a whole entry, at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from openvclip.errors import NonFiniteMergeError, WeightTypeError
from openvclip.weights.finite import may_be_broken, require_same_infinities
from openvclip.weights.numerics import computable, is_interpolable

Merge: TypeAlias = Callable[[list[dict[str, Tensor]]], Mapping[str, Tensor]]
"""A merge method: maps a list of state dicts, one for each model, to one state dict.

All state dicts have the same names.
"""


def mean(_: str, values: list[Tensor], results: list[Tensor]) -> None:
    """Compute a part of the mean over the inputs, with sums in float64; see ``Compute``."""
    last = values[-1]
    if not is_interpolable(last):
        results[0].copy_(last)
        return
    is_complex = any(value.is_complex() for value in values)
    wide = torch.complex128 if is_complex else torch.float64
    total = values[0].to(wide, copy=True)
    addend = torch.empty_like(total)
    for value in values[1:]:
        total.add_(addend.copy_(value))  # twice as fast as adding a tensor of another dtype
    results[0].copy_(total.div_(len(values)))


@dataclass(frozen=True)
class FiniteOnly:
    """Arithmetic that writes no NaN and no infinity, except for infinities that all models hold.

    Attributes:
        compute: the arithmetic, see ``Compute``.
        models: names of the models, for the error text.
    """

    compute: Callable[[str, list[Tensor], list[Tensor]], None]
    models: list[str]

    def __call__(self, name: str, values: list[Tensor], results: list[Tensor]) -> None:
        """Compute a part of an entry, and check the part while it is in the cache."""
        try:
            self.compute(name, values, results)
        except NonFiniteMergeError:
            require_same_infinities(name, values, self.models)
            raise
        broken = [result for result in results if may_be_broken(result)]
        if broken:
            require_same_infinities(name, values, self.models)
        for result in broken:
            _require_in_range(name, result, values[-1])


def _require_in_range(name: str, result: Tensor, value: Tensor) -> None:
    """Refuse NaN, and infinities that the models do not hold.

    Args:
        name: name of the entry.
        result: the merged values.
        value: the values of one model. All models hold infinities in the same places.

    Raises:
        NonFiniteMergeError: the result holds such values.
    """
    merged = computable(result)
    is_new = merged.isnan() | (merged.isinf() & torch.isfinite(computable(value)))
    if bool(is_new.any()):
        advice = "Look at the merge method."
        if torch.finfo(result.dtype).max < torch.finfo(torch.float32).max:
            advice = (
                f"Values beyond the range of {result.dtype} become NaN or infinity: give a dtype "
                "with a larger range, such as float32."
            )
        raise NonFiniteMergeError(
            f"{name}: the merge gives NaN, or infinity where the files hold none. {advice}"
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
