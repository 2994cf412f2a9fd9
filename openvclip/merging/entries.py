"""What all merge methods share: models with the same names, and arithmetic entry by entry."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast, overload

import torch
from torch import Tensor

from openvclip.errors import MergeError, NonFiniteMergeError
from openvclip.weights.averageable import require_combinable
from openvclip.weights.changes import difference as difference
from openvclip.weights.finite import require_same_infinities
from openvclip.weights.interpolation import Lambda, as_number
from openvclip.weights.kinds import require_values
from openvclip.weights.names import canonical_model, is_extra_state, require_match
from openvclip.weights.numerics import (
    common_dtype,
    compute_dtype,
    device_for_float64,
    dtype_of_result,
    is_interpolable,
)
from openvclip.weights.relative import FineTuned, RelativeWeights
from openvclip.weights.shards import sharded_like, whole

Combine = Callable[[str, list[Tensor]], Tensor]
"""A function from the name of an entry and its real tensors, one per model, to the merged tensor.

The result is a new tensor of the same shape.
"""

_PIECE = 1 << 19  # elements

_HINT = (
    "All state dicts must come from the same architecture. Prefixes of wrappers (module., "
    "_orig_mod.) are already removed from the names."
)


class Models(Sequence[Mapping[str, Tensor]]):
    """Models under canonical names, and what error texts call them.

    Args:
        states: weights and extra state of each model.
        names: name of each model in error texts.
    """

    def __init__(self, states: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> None:
        self._states, self.names = list(states), list(names)

    def __len__(self) -> int:
        return len(self._states)

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Models: ...
    def __getitem__(self, index: int | slice) -> Mapping[str, Tensor] | Models:
        if isinstance(index, slice):
            return Models(self._states[index], self.names[index])
        return self._states[index]


def matched(
    base: Mapping[str, Tensor],
    others: Sequence[FineTuned],
    what: str = "base",
    what_others: str = "tuned[{}]",
    *,
    vectors: bool = False,
) -> Models:
    """Return all models under canonical names, ``base`` first.

    An entry of an adapter is merged when it is read, so one merged entry is in memory at a time.

    Args:
        base: state dict that defines the expected names and shapes.
        others: state dicts of one or more other models, or adapters of LoRA fine-tunes of ``base``.
        what: name of ``base`` in error texts.
        what_others: name of each other model in error texts; ``{}`` is its position.
        vectors: whether ``others`` are task vectors. The checks for models are then left out.

    Returns:
        Weights and extra state. No copies are made.

    Raises:
        MergeError: ``others`` is empty, or a single state dict instead of a sequence.
        StateMismatchError: another model has other names or shapes than ``base``.
        WeightTypeError: a model is not a mapping from names to tensors, or an entry can't be
            merged: see :func:`openvclip.weights.averageable.require_combinable`.
        UsageError: two models share the memory of all their weights.
    """
    if not isinstance(others, Sequence) or not others:
        received = "none" if isinstance(others, Sequence) else f"one {type(others).__name__}"
        raise MergeError(f"Expected a list of one or more state dicts to merge, got {received}.")
    entries, extra_state = canonical_model(base, what)
    require_values(entries, what)
    result: list[Mapping[str, Tensor]] = [entries | extra_state]
    states, names = [entries], [what]
    for position, other in enumerate(others):
        if isinstance(other, RelativeWeights) and not vectors:
            result.append(other.on(base))
            continue
        names.append(what_others.format(position))
        entries, extra_state = canonical_model(cast(Mapping[str, Tensor], other), names[-1])
        require_values(entries, names[-1])
        states.append(entries)
        result.append(entries | extra_state)
        summary = (
            f"{names[-1]} and {what} do not fit together: expected the names and shapes of {what}."
        )
        require_match(states[0], states[-1], summary, _HINT)
    if not vectors:
        require_combinable(states, names, "merge")
    first = "base, the original model" if what == "base" else what
    return Models(result, [first, *(what_others.format(k) for k in range(len(others)))])


@torch.no_grad()
def combined(
    states: Sequence[Mapping[str, Tensor]],
    combine: Combine,
    dtype: torch.dtype | None,
    *,
    narrow: bool = True,
) -> dict[str, Tensor]:
    """Return the entries that ``combine`` computes, in at least float32 and rounded once.

    Args:
        states: models with the same canonical names and shapes.
        combine: function that merges the tensors of one entry. All tensors are on the device of
            the first model's entry, or on the CPU if that device has no float64. A complex tensor
            is passed as pairs of real numbers (``[..., 2]``).
        dtype: dtype of the floating-point entries of the result. Default: the narrowest dtype that
            holds the entries of all models.
        narrow: whether the default dtype may be half precision.

    Returns:
        A new dict in the order of the first state. Integer and boolean entries and extra state are
        copied from the first state. An entry is sharded if it is sharded in the first state.
        Sharded entries are gathered one at a time, so every process must call this function.

    Raises:
        NonFiniteMergeError: ``combine`` raised it. If ``states`` are :class:`Models`, the error
            names the entry and the models.
    """
    names = states.names if isinstance(states, Models) else None
    result = {}
    for name, first in states[0].items():
        if is_extra_state(name):
            result[name] = copy.deepcopy(first)
        elif not is_interpolable(first):
            result[name] = contiguous_copy(first)
        else:
            entries = [whole(state[name]) for state in states]
            home = device_for_float64(first.device)  # most methods compute in float64
            common = functools.reduce(common_dtype, (entry.dtype for entry in entries))
            entries = [_real(entry, home, common) for entry in entries]
            merged = _merged(name, entries, combine, names)
            merged = torch.view_as_complex(merged) if common.is_complex else merged
            default = common if narrow else compute_dtype(common)
            merged = merged.to(dtype_of_result(default, dtype)).contiguous().to(first.device)
            result[name] = sharded_like(merged, first)
    return result


def _merged(
    name: str, entries: list[Tensor], combine: Combine, names: Sequence[str] | None
) -> Tensor:
    try:
        return combine(name, entries)
    except NonFiniteMergeError as error:
        if names is None:
            raise
        require_same_infinities(name, entries, names)
        raise NonFiniteMergeError(f"{name}: {error}") from None


def in_pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Return matching pieces of tensors of one shape, flat. The first tensor must be contiguous.

    On a CPU, a piece stays in the cache, so that several operations cost little more than one.
    """
    first, others = tensors[0].view(-1), tensors[1:]
    size = _PIECE if first.device.type == "cpu" else max(1, len(first))
    for pieces in zip(first.split(size), *(t.reshape(-1).split(size) for t in others), strict=True):
        yield list(pieces)


def require_same_infinities_in(models: Models, names: Iterable[str]) -> None:
    """Refuse NaN and infinities in some entries, unless all models hold the same infinities.

    Raises:
        NonFiniteMergeError: see :func:`openvclip.weights.finite.require_same_infinities`.
    """
    for name in dict.fromkeys(names):
        values = [whole(model[name]) for model in models]
        values = [value.to(values[0].device) for value in values]
        require_same_infinities(name, values, models.names)


def task_vector_of(pair: Models, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return the change between two models: see :func:`openvclip.merging.task_vector`."""
    floating_point = Models([interpolable_entries(pair[0]), pair[1]], pair.names)
    return combined(
        floating_point, lambda _, entries: difference(entries[1], entries[0]), dtype, narrow=False
    )


def contiguous_copy(tensor: Tensor) -> Tensor:
    """Return a contiguous copy without a graph."""
    # A plain clone keeps the strides of an expanded view, whose elements share memory.
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _real(entry: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    wide = entry.to(device, compute_dtype(dtype))
    return torch.view_as_real(wide.resolve_conj()) if wide.is_complex() else wide


def interpolable_entries(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the floating-point and complex entries of a state dict, without extra state."""
    return {
        name: value
        for name, value in state.items()
        if not is_extra_state(name) and is_interpolable(value)
    }


def scale_of(scale: Lambda, name: str) -> float:
    """Return the scale of one entry.

    Raises:
        LambdaError: the scale is not a finite number.
    """
    if callable(scale):
        return as_number(scale(name), f"scale({name!r})")
    return as_number(scale, "scale")


def require_share(value: float, what: str, *, allow_one: bool) -> None:
    """Require a value in [0, 1], or in [0, 1) with ``allow_one=False``; else raise a MergeError.

    Args:
        value: the share.
        what: name of the argument, for the error text.
        allow_one: whether the value may be 1.
    """
    if not (0.0 <= value < 1.0 or (allow_one and value == 1.0)):
        interval = "[0, 1]" if allow_one else "[0, 1)"
        raise MergeError(f"{what}={value!r}: expected a share in {interval}.")
