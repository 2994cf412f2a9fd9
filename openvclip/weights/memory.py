"""Memory of tensors: ties, which are names of one memory, and tensors that overlap in part."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from openvclip.errors import UsageError
from openvclip.weights.numerics import memory_of
from openvclip.weights.shards import is_sharded, local

T = TypeVar("T", bound=Tensor)

_PLAIN = frozenset({Tensor, nn.Parameter})


def view_of(tensor: Tensor) -> Hashable:
    """Return a key that is the same for two tensors if they are the same values in memory.

    Two ``nn.Parameter`` objects can be the same values: ``load_state_dict(assign=True)`` makes two
    parameters of one memory out of a tied parameter.
    """
    part = local(tensor) if is_sharded(tensor) else tensor
    if _has_address(part):
        place = part.device, part.data_ptr(), part.dtype, part.shape, part.stride()
        return (*place, part.is_conj(), part.is_neg())
    if is_lazy(part) or part.layout != torch.strided:
        return id(tensor)
    # Empty tensors have no address. A process can hold an empty shard of a tie, and must find the
    # same ties as all other processes.
    storage: Any = part.untyped_storage()
    return part.device, storage._cdata, part.dtype, part.shape


def is_one_view(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same values in memory: the keys of :func:`view_of` agree.

    For plain tensors with different addresses, which is the usual case, this is much faster.
    """
    plain = type(a) in _PLAIN and type(b) in _PLAIN and a.layout == b.layout == torch.strided
    if plain and a.data_ptr() != b.data_ptr():
        return False
    return view_of(a) == view_of(b)


def tied_names(entries: Mapping[str, Tensor]) -> dict[str, str]:
    """Return ``{name: kept name}`` for the entries that are the same values as another entry.

    Of the names of one memory, the first name that requires gradients is kept, or the first name.
    """
    names_of: dict[Hashable, list[str]] = {}
    for name, value in entries.items():
        names_of.setdefault(view_of(value), []).append(name)
    ties = {}
    for names in names_of.values():
        if len(names) > 1:
            kept = next((name for name in names if entries[name].requires_grad), names[0])
            ties.update({name: kept for name in names if name != kept})
    return ties


def without_ties(entries: Mapping[str, T]) -> dict[str, T]:
    """Return the entries without the additional names of :func:`tied_names`."""
    ties = tied_names(entries)
    return {name: value for name, value in entries.items() if name not in ties}


def require_no_overlap(
    entries: Mapping[str, Tensor], names: Iterable[str], *, unless_both: bool = False
) -> None:
    """Raise an error if an entry would be changed together with a part of another entry.

    Args:
        entries: live entries of a model without :func:`tied_names`.
        names: names of the entries that will be changed.
        unless_both: whether to accept an overlap of two entries that will both be changed.

    Raises:
        UsageError: two entries share some values, but are not the same view of the same memory,
            for example a weight and its transpose.
    """
    by_storage: dict[Hashable, list[tuple[int, int, str]]] = {}
    for name, value in entries.items():
        part = local(value)
        if _has_address(part):
            by_storage.setdefault(memory_of(part), []).append((*_range(part), name))
    changed, counts = set(names), {1} if unless_both else {1, 2}
    for views in by_storage.values():
        latest: list[tuple[int, int, str]] = []  # views that can reach to the next one
        for start, end, name in sorted(views):
            latest = [view for view in latest if view[1] > start]
            for other in (view[2] for view in latest):
                is_changed = len(changed & {name, other}) in counts
                if is_changed and overlap(entries[other], entries[name]):
                    raise UsageError(
                        f"{other} and {name} share a part of their memory, so a change of one "
                        "changes the other. Make them separate parameters (.clone()), or use one "
                        "nn.Parameter in both modules."
                    )
            latest.append((start, end, name))


def _has_address(part: Tensor) -> bool:
    if is_lazy(part) or part.is_meta or part.layout != torch.strided:
        return False
    return part.numel() > 0


def _range(view: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte, and of the first byte after the last value."""
    last = sum((size - 1) * step for size, step in zip(view.shape, view.stride(), strict=True))
    return view.data_ptr(), view.data_ptr() + (last + 1) * view.element_size()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one memory have a value in common in this process."""
    a, b = local(a), local(b)
    if not (_has_address(a) and _has_address(b)):
        return False
    (a_start, a_end), (b_start, b_end) = _range(a), _range(b)
    if a_end <= b_start or b_end <= a_start:
        return False
    if a.dtype != b.dtype:
        return True
    # The ranges of two columns of a matrix overlap, but their values do not.
    first = min(a_start, b_start)
    used = torch.zeros((max(a_end, b_end) - first) // a.element_size(), dtype=torch.bool)
    used.as_strided(a.shape, a.stride(), (a_start - first) // a.element_size()).fill_(True)
    return bool(used.as_strided(b.shape, b.stride(), (b_start - first) // b.element_size()).any())
