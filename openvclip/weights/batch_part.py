"""A random part of the clips of a batch, for the second gradient of a regulariser."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from openvclip.errors import UsageError

_Named: TypeAlias = tuple[str, Any]


def part_size(share: float, clips: int) -> int:
    """Return the number of clips in a share of a batch: rounded, half a clip up, and at least 1.

    Args:
        share: the share, in (0, 1].
        clips: the number of clips in the batch, at least 1.
    """
    return max(1, min(clips, math.floor(share * clips + 0.5)))


def number_of_clips(batch: Sequence[Any]) -> int:
    """Return the number of clips in a batch. See :func:`take_clips` for what a batch is.

    Raises:
        UsageError: the batch holds no clips.
    """
    clips = _count(_arguments(batch))
    if not clips:
        what = "an empty batch" if clips == 0 else "no tensors and no lists of clips"
        raise UsageError(
            f"share < 1 needs a batch with at least one clip, but the call has {what}. Pass the "
            "tensors of the batch after the closure: iwr.step(closure, video, label)."
        )
    return clips


def take_clips(batch: Sequence[Any], chosen: Sequence[int]) -> tuple[Any, ...]:
    """Return the chosen clips of a batch. The batch and its entries are not changed.

    Args:
        batch: the arguments of a closure. Each argument is one of these:

            * a tensor or a NumPy array with the clips along its first axis;
            * a list or tuple with one entry for each clip, such as videos of different sizes;
            * a dict, or a list or tuple, of such arguments;
            * ``None``, a number, a text, a tensor without axes, or any other object. These are
              returned as they are.

            A list is read as one entry for each clip if its length is the number of clips and its
            entries are of one kind. The number of clips is the length of the first tensor that is
            not in a list, or else of the first list of clips. A list of one tensor is read as this
            tensor if no other entry shows the number of clips.
        chosen: the numbers of the clips.

    Raises:
        UsageError: the batch holds no clips, or arguments have different numbers of clips.
    """
    clips = number_of_clips(batch)
    taker = _Taker(clips, chosen)
    return tuple(taker.take(entry, name) for name, entry in _arguments(batch))


class _Taker:
    """Takes the chosen clips of nested entries."""

    def __init__(self, clips: int, chosen: Sequence[int]) -> None:
        self.clips, self.chosen = clips, list(chosen)
        self._index = torch.tensor(self.chosen, dtype=torch.int64)

    def take(self, entry: Any, name: str) -> Any:
        """Return the chosen clips of an entry.

        Args:
            entry: the entry.
            name: what an error calls the entry.
        """
        if _is_array(entry):
            self._require_clips(len(entry), name)
            if isinstance(entry, Tensor):
                # Advanced indexing keeps the memory format. The copy of the index does not wait.
                return entry[self._index.to(entry.device, non_blocking=True)]
            return entry[self.chosen]
        if isinstance(entry, Mapping):
            taken = {key: self.take(value, f"{name}[{key!r}]") for key, value in entry.items()}
            return _like_mapping(entry, taken)
        if not _is_sequence(entry):
            return entry
        if _is_group(entry, self.clips):
            return _like_sequence(
                entry, [self.take(value, f"{name}[{i}]") for i, value in enumerate(entry)]
            )
        self._require_clips(len(entry), name)
        return _like_sequence(entry, [entry[number] for number in self.chosen])

    def _require_clips(self, clips: int, name: str) -> None:
        if clips != self.clips:
            raise UsageError(
                f"The batch has {self.clips} clips, but {name} has {clips} entries along its first "
                "axis. Pass tensors with the clips along the first axis, or lists with one entry "
                "for each clip. What belongs to no clip goes into the closure itself."
            )


def _arguments(batch: Sequence[Any]) -> list[_Named]:
    return [(f"argument {number}", entry) for number, entry in enumerate(batch, start=1)]


def _count(entries: Iterable[_Named]) -> int | None:
    """Return the number of clips; ``None`` if no entry has clips."""
    leaves = list(_outside_of_lists(entry for _, entry in entries))
    for leaf in leaves:
        if _is_array(leaf):
            return len(leaf)
    # A list of clips shows their number; the list [clip] alone could also be a list of arguments.
    for leaf in sorted(leaves, key=lambda leaf: _is_group(leaf, None)):
        clips = _count(_arguments(leaf)) if _is_group(leaf, None) else len(leaf)
        if clips is None and len(leaf) == 1:  # what describes the only clip
            clips = 1
        if clips is not None:
            return clips
    return None


def _outside_of_lists(entries: Iterable[Any]) -> Iterator[Any]:
    """Yield the arrays and lists, also those in dicts."""
    for entry in entries:
        if isinstance(entry, Mapping):
            yield from _outside_of_lists(entry.values())
        elif _is_array(entry) or _is_sequence(entry):
            yield entry


def _is_array(entry: Any) -> bool:
    return isinstance(entry, (Tensor, np.ndarray)) and entry.ndim > 0


def _is_sequence(entry: Any) -> bool:
    return isinstance(entry, Sequence) and not isinstance(entry, (str, bytes, bytearray))


def _is_group(entries: Sequence[Any], clips: int | None) -> bool:
    """Return whether a list holds several arguments, and not one entry for each clip.

    Args:
        entries: the list.
        clips: the number of clips, if it is known.
    """
    if not any(_is_array(e) or _is_sequence(e) or isinstance(e, Mapping) for e in entries):
        return False
    if clips is not None and len(entries) != clips:
        return True
    kinds = {_kind(entry) for entry in entries if entry is not None}
    if len(kinds) > 1:
        return True
    # A loader gives [tensor] for a data set of one tensor. A dict or tuple alone is a clip.
    return clips is None and len(entries) == 1 and _is_array(entries[0])


def _kind(entry: Any) -> object:
    return (entry.dtype, entry.ndim) if isinstance(entry, (Tensor, np.ndarray)) else type(entry)


def _like_mapping(entry: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """Return the values in a mapping of the type of ``entry``, such as a ``BatchEncoding``."""
    # The plain copy of another class can share its entries with the batch.
    has_copy = isinstance(entry, (dict, UserDict)) or hasattr(type(entry), "__copy__")
    if not (has_copy and isinstance(entry, MutableMapping)):
        return values
    other = copy.copy(entry)
    for key, value in values.items():
        other[key] = value
    return other


def _like_sequence(entry: Sequence[Any], values: list[Any]) -> Any:
    if not isinstance(entry, tuple):
        return values
    # A named tuple has the fields as arguments.
    return type(entry)(*values) if hasattr(entry, "_fields") else tuple(values)
