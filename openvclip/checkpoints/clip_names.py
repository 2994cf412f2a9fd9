"""The names of the entries of open_clip's ``CLIP``, and which of them a checkpoint lacks."""

from __future__ import annotations

import re
from collections.abc import Collection

_BLOCK_PARTS = (
    "attn.in_proj_weight",
    "attn.in_proj_bias",
    *(
        f"{part}.{kind}"
        for part in ("ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    ),
)
# The entries of each tower outside its blocks, without the projection.
_IMAGE_NAMES = (
    "visual.class_embedding",
    "visual.positional_embedding",
    "visual.conv1.weight",
    *(f"visual.{norm}.{kind}" for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")),
)
_TEXT_NAMES = (
    "token_embedding.weight",
    "positional_embedding",
    "ln_final.weight",
    "ln_final.bias",
)
_BLOCK_NAME = re.compile(
    r"(?P<tower>(?:visual\.|text\.)?transformer)\.resblocks\.(?P<layer>\d+)\.(?P<part>.+)"
)
_RESNET_NAME = re.compile(r"visual\.((conv|bn)[123]|layer[1-4]\.\d+|attnpool)\.")


def is_clip_name(name: str) -> bool:
    """Return whether open_clip's ``CLIP`` can have an entry of this name."""
    block = _BLOCK_NAME.fullmatch(name)
    if block:
        return block["part"] in _BLOCK_PARTS and block["tower"] != "text.transformer"
    others = (*_IMAGE_NAMES, *_TEXT_NAMES, "visual.proj", "text_projection", "logit_scale")
    return name in others or _RESNET_NAME.match(name) is not None


def missing_names(names: Collection[str], *, single_towers: bool) -> tuple[str, ...]:
    """Return the names that a CLIP must have, but that ``names`` lacks.

    The function reads from ``names`` which towers the CLIP has, and how many layers.

    Args:
        names: the names of the checkpoint's entries, translated to open_clip's names.
        single_towers: whether the checkpoint may hold one tower alone, with or without its
            projection.
    """
    has_image = any(name.startswith("visual.") for name in names)
    has_text = any(not name.startswith(("visual.", "logit_scale")) for name in names)
    is_resnet = any(_RESNET_NAME.match(name) for name in names if name != "visual.conv1.weight")
    is_single = single_towers and not (has_image and has_text)
    expected = set(_block_names(names))
    if has_image and not is_resnet:
        expected |= {*_IMAGE_NAMES} | (set() if is_single else {"visual.proj"})
    if has_text:
        expected |= {*_TEXT_NAMES} | (set() if is_single else {"text_projection"})
    if not is_single:
        expected |= {"visual.conv1.weight", "token_embedding.weight", "logit_scale"}
    return tuple(sorted(expected - set(names)))


def uneven_blocks(names: Collection[str]) -> tuple[str, ...]:
    """Return the entries that some blocks of a tower lack and other blocks of the tower have."""
    missing: list[str] = []
    for tower, layers in _parts_of_blocks(names).items():
        parts = set().union(*layers.values())
        for layer in range(1 + max(layers)):
            missing_parts = sorted(parts - layers.get(layer, set()))
            missing.extend(f"{tower}.resblocks.{layer}.{part}" for part in missing_parts)
    return tuple(missing)


def _block_names(names: Collection[str]) -> list[str]:
    """Return the names of all entries that the blocks of the towers should have.

    The blocks of a tower are the blocks from 0 to the largest number in ``names``.
    """
    return [
        f"{tower}.resblocks.{layer}.{part}"
        for tower, layers in _parts_of_blocks(names).items()
        for layer in range(1 + max(layers))
        for part in _BLOCK_PARTS
    ]


def _parts_of_blocks(names: Collection[str]) -> dict[str, dict[int, set[str]]]:
    """Return the parts of each block, as ``{name of the tower: {number of the block: parts}}``."""
    towers: dict[str, dict[int, set[str]]] = {}
    for name in names:
        match = _BLOCK_NAME.fullmatch(name)
        if match:
            layers = towers.setdefault(match["tower"], {})
            layers.setdefault(int(match["layer"]), set()).add(match["part"])
    return towers
