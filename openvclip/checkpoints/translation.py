"""How an entry of open_clip's ``CLIP`` is made from the entries of a file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from openvclip.checkpoints.clip_names import is_clip_name
from openvclip.errors import CheckpointError


@dataclass(frozen=True)
class Source:
    """The entries of a file that make up one entry of the result.

    Attributes:
        names: names of entries in the file. Several entries are joined along their first axis.
        transposed: whether the result is the transpose of the entry in the file.
    """

    names: tuple[str, ...]
    transposed: bool = False

    def take(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the entry of the result. An entry that is only renamed is not copied.

        Raises:
            CheckpointError: the shapes of the entries are not those of CLIP.
        """
        parts = [weights[name] for name in self.names]
        if len({part.shape for part in parts}) > 1 or (self.transposed and parts[0].ndim != 2):
            shapes = ", ".join(f"{name} {list(weights[name].shape)}" for name in self.names)
            raise CheckpointError(
                f"The shapes are not those of CLIP: {shapes}; expected "
                f"{'a matrix' if self.transposed else 'query, key and value of one shape'}."
            )
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.T.contiguous() if self.transposed else joined


Translation: TypeAlias = Callable[[Collection[str]], dict[str, Source]]
"""Takes the names in a file, and returns a dictionary of open_clip's names to their sources."""


def keep_names(names: Collection[str]) -> dict[str, Source]:
    """Keep every name."""
    return {name: Source((name,)) for name in names}


def keep_clip_names(names: Collection[str]) -> dict[str, Source]:
    """Keep the names that open_clip's ``CLIP`` has."""
    return {name: Source((name,)) for name in names if is_clip_name(name)}


def strip_model_prefix(names: Collection[str]) -> dict[str, Source]:
    """Remove the prefix ``model.`` and keep the names that open_clip's ``CLIP`` has."""
    prefix = "model."
    inner_names = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    return {inner: Source((name,)) for inner, name in inner_names.items() if is_clip_name(inner)}
