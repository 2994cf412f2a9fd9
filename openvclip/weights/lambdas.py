"""Interpolation weights by name: functions to pass as ``lam`` to ``interpolate`` and its kin."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import SupportsFloat

from openvclip.errors import LambdaError
from openvclip.weights.interpolation import Lambda
from openvclip.weights.names import canonical_names

# open_clip's transformer.resblocks.3., timm's blocks.3., Hugging Face's encoder.layers.3.
_BLOCK = re.compile(r"^(?P<tower>(?:.*?\.)?(?:resblocks|blocks|layers|layer))\.(?P<index>\d+)\.")
_VISUAL_PARTS = frozenset({"visual", "vision_model", "visual_projection"})


def by_depth(
    first: float,
    last: float,
    blocks: int | Iterable[str],
    *,
    outside: float | None = None,
) -> Callable[[str], float]:
    r"""A weight that goes linearly from the shallowest block of a tower to the deepest.

    Block :math:`\ell = 1, ..., L` of a transformer gets
    :math:`\text{first} + (\text{last} - \text{first}) (\ell - 1) / (L - 1)`, as in LiNeS (Wang et
    al., ICLR 2025). Blocks are known by their names: ``transformer.resblocks.N.`` and
    ``visual.transformer.resblocks.N.`` (open_clip), ``blocks.N.`` (timm), ``encoder.layers.N.``
    (Hugging Face). Each tower is counted by itself.

    Args:
        first: weight of each tower's first block, and of its only one.
        last: weight of each tower's last block.
        blocks: number of blocks, of every tower, or the names to count them in, for example a
            state dict.
        outside: weight of everything that is in no block: embeddings, the last norm, projections,
            the logit scale. By default ``first``, as in LiNeS.

    Returns:
        A function from an entry's plain name to its weight.

    Raises:
        LambdaError: there are no blocks; or, by the function, a name has a block beyond the last.

    Example:
        >>> lam = by_depth(1.0, 0.0, 12)  # shallow blocks stay CLIP's
        >>> lam("visual.transformer.resblocks.11.ln_1.weight")
        0.0
    """
    depths = blocks if isinstance(blocks, int) else _count_blocks(blocks)
    if not depths or (isinstance(depths, int) and depths < 0):
        raise LambdaError(
            "by_depth found no blocks (names such as visual.transformer.resblocks.0., blocks.0. or "
            "encoder.layers.0.); pass the number of blocks or the state dict of a transformer."
        )
    rest = first if outside is None else outside

    def weight_of(name: str) -> float:
        found = _BLOCK.match(name)
        if found is None:
            return rest
        index, tower = int(found["index"]), found["tower"]
        depth = depths if isinstance(depths, int) else depths.get(tower, 0)
        if index >= depth:
            raise LambdaError(
                f"{name!r} lies in block {index} (from 0) of {tower!r}, of which by_depth was told "
                f"{depth} blocks; make it with the number of blocks of this model."
            )
        share = index / max(depth - 1, 1)
        return (1.0 - share) * first + share * last

    return weight_of


def _count_blocks(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for found in map(_BLOCK.match, canonical_names(names)):
        if found is not None:
            counts[found["tower"]] = max(counts.get(found["tower"], 0), int(found["index"]) + 1)
    return counts


def visual_only(lam: Lambda) -> Callable[[str], SupportsFloat]:
    """The weight ``lam`` in the visual tower and 1, the original model, everywhere else.

    Of the visual tower are the entries with ``visual`` (open_clip), ``vision_model`` or
    ``visual_projection`` (Hugging Face) as a part of the name. The text tower, the logit scale and
    the logit bias stay bitwise the original's, so text features that were computed before serve
    the interpolated model. In the state dict of a bare tower no name has these parts: pass ``lam``
    itself there.

    Args:
        lam: a number, or a function from a name to its number such as :func:`by_depth` gives.

    Returns:
        A function from an entry's plain name to its weight:
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
