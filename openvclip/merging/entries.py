"""What the methods have in common: matched models, and arithmetic entry by entry."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from openvclip.errors import MergeError
from openvclip.weights.names import canonical_state, require_match
from openvclip.weights.numerics import common_dtype, compute_dtype, is_interpolable

Combine = Callable[[str, list[Tensor]], Tensor]
"""From an entry's name and its real tensors, one for each model, to a new tensor of their shape."""

_HINT = (
    "All state dicts must come from the same architecture; wrappers' prefixes (module., "
    "_orig_mod.) are already taken out of the names."
)


def matched(
    base: Mapping[str, Tensor],
    others: Sequence[Mapping[str, Tensor]],
    what: str = "base",
    what_others: str = "tuned[{}]",
) -> list[dict[str, Tensor]]:
    """All models under canonical names, ``base`` first.

    Raises:
        MergeError: there are no others, or one state dict stands where a sequence is expected.
        StateMismatchError: one of the others has other names or shapes than ``base``.
        WeightTypeError: one is not a mapping from names to tensors.
    """
    if not isinstance(others, Sequence) or not others:
        given = "none" if isinstance(others, Sequence) else f"one {type(others).__name__}"
        raise MergeError(f"Expected a list of one or more state dicts to merge, got {given}.")
    states = [canonical_state(base, what)]
    for number, other in enumerate(others):
        name = what_others.format(number)
        states.append(canonical_state(other, name))
        text = f"{name} and {what} do not fit together ({what} is expected)."
        require_match(states[0], states[-1], text, _HINT)
    return states


@torch.no_grad()
def combined(
    states: Sequence[Mapping[str, Tensor]],
    combine: Combine,
    dtype: torch.dtype | None,
    *,
    narrow: bool = True,
) -> dict[str, Tensor]:
    """Each entry made by ``combine`` in at least float32 and rounded once.

    Args:
        states: models with the same canonical names and shapes.
        combine: gets the entries on the device of the first model's, complex ones as pairs of
            real numbers (``[..., 2]``), and returns a new tensor of their shape.
        dtype: dtype of the floating-point entries of the result; by default the narrowest that
            holds those of all models.
        narrow: whether that may be half precision.

    Returns:
        A new dict in the order of the first state, integer and boolean entries copied from it.
    """
    result = {}
    for name, first in states[0].items():
        if not is_interpolable(first):
            result[name] = own(first)
            continue
        entries = [state[name].detach() for state in states]
        kept = functools.reduce(common_dtype, (entry.dtype for entry in entries))
        merged = combine(name, [_real(entry, first.device, kept) for entry in entries])
        merged = torch.view_as_complex(merged) if kept.is_complex else merged
        default = kept if narrow else compute_dtype(kept)
        result[name] = merged.to(default if dtype is None else dtype).contiguous()
    return result


def own(tensor: Tensor) -> Tensor:
    """A contiguous copy without a graph."""
    # A plain clone keeps the strides of an expanded view, whose elements share memory.
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _real(entry: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    wide = entry.to(device, compute_dtype(dtype))
    return torch.view_as_real(wide.resolve_conj()) if wide.is_complex() else wide


def difference(tuned: Tensor, base: Tensor) -> Tensor:
    """``tuned - base``, and 0 where they are equal, which the ``-inf`` of two masks are too."""
    delta = tuned - base
    if not bool(torch.isfinite(delta.sum())):
        delta[tuned == base] = 0.0
    return delta


def require_share(value: float, what: str, *, one: bool) -> None:
    """Raise a :class:`MergeError` unless the value lies in [0, 1], or in [0, 1) without ``one``."""
    if not (0.0 <= value < 1.0 or (one and value == 1.0)):
        raise MergeError(f"{what}={value!r}: expected a share in [0, 1{']' if one else ')'}.")
