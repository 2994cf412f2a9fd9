"""Interpolation weights by name: functions to pass as ``lam`` or as a scale."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import SupportsFloat

from openvclip.errors import LambdaError
from openvclip.weights.interpolation import Lambda
from openvclip.weights.names import canonical_names

# open_clip: transformer.resblocks.3.  timm: blocks.3.  Hugging Face: encoder.layers.3.
_BLOCK = re.compile(r"^(?P<tower>(?:.*?\.)?(?:resblocks|blocks|layers|layer))\.(?P<index>\d+)\.")
_VISUAL_PARTS = frozenset({"visual", "vision_model", "visual_projection"})


def by_depth(
    first: float,
    last: float,
    blocks: int | Iterable[str],
    *,
    outside: float | None = None,
) -> Callable[[str], float]:
    r"""Return a weight that changes linearly from the first to the last block of a tower.

    Block :math:`\ell = 1, ..., L` of a transformer gets the weight
    :math:`\text{first} + (\text{last} - \text{first}) (\ell - 1) / (L - 1)`, as in LiNeS (Wang et
    al., ICLR 2025). Blocks are recognised by their names: ``transformer.resblocks.N.`` and
    ``visual.transformer.resblocks.N.`` (open_clip), ``blocks.N.`` (timm), ``encoder.layers.N.``
    (Hugging Face). The blocks of each tower are counted separately.

    Args:
        first: weight of the first block of each tower. A single block gets this weight.
        last: weight of the last block of each tower.
        blocks: number of blocks of every tower, or names of entries (for example a state dict) in
            which the blocks are counted.
        outside: weight of all entries outside the blocks: embeddings, the last norm, projections
            and the logit scale. Default: ``first``, as in LiNeS.

    Returns:
        A function from the canonical name of an entry to its weight.

    Raises:
        LambdaError: there are no blocks. The returned function raises a ``LambdaError`` for a name
            whose block index is not below the number of blocks.

    Example:
        >>> lam = by_depth(1.0, 0.0, 12)  # shallow blocks near the original CLIP
        >>> lam("visual.transformer.resblocks.11.ln_1.weight")
        0.0
    """
    depths = blocks if isinstance(blocks, int) else _count_blocks(blocks)
    if not depths or (isinstance(depths, int) and depths < 0):
        raise LambdaError(
            "by_depth found no blocks: expected names such as visual.transformer.resblocks.0., "
            "blocks.0. or encoder.layers.0.; pass the number of blocks or the state dict of a "
            "transformer."
        )
    outside_weight = first if outside is None else outside

    def weight_of(name: str) -> float:
        match = _BLOCK.match(name)
        if match is None:
            return outside_weight
        index, tower = int(match["index"]), match["tower"]
        depth = depths if isinstance(depths, int) else depths.get(tower, 0)
        if index >= depth:
            raise LambdaError(
                f"{name!r} belongs to block {index} (from 0) of {tower!r}, but by_depth was told "
                f"{depth} blocks. Pass the number of blocks of this model to by_depth."
            )
        share = index / max(depth - 1, 1)
        return (1.0 - share) * first + share * last

    return weight_of


def _count_blocks(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for match in map(_BLOCK.match, canonical_names(names)):
        if match is not None:
            counts[match["tower"]] = max(counts.get(match["tower"], 0), int(match["index"]) + 1)
    return counts


def visual_only(lam: Lambda) -> Callable[[str], SupportsFloat]:
    """Return a weight that is ``lam`` in the visual tower and 1 (the original model) elsewhere.

    An entry belongs to the visual tower if a part of its name is ``visual`` (open_clip),
    ``vision_model`` or ``visual_projection`` (Hugging Face). The text tower, the logit scale and
    the logit bias stay bitwise those of the original model. Text features of the original model
    are therefore valid for the interpolated model too. In the state dict of a visual tower alone,
    the names lack these parts: use ``lam`` itself for such a state dict.

    Args:
        lam: a number, or a function from a name to its number, for example from :func:`by_depth`.

    Returns:
        A function from the canonical name of an entry to its weight, for example for
        ``interpolate(clip, tuned, visual_only(0.5))``.

    Example:
        >>> lam = visual_only(0.5)
        >>> lam("visual.proj"), lam("text_projection")
        (0.5, 1.0)
    """

    def weight_of(name: str) -> SupportsFloat:
        if _VISUAL_PARTS.isdisjoint(name.split(".")):
            return 1.0
        return lam(name) if callable(lam) else lam

    return weight_of
