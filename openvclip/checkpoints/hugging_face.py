"""The names of Hugging Face's CLIP, translated to open_clip's names."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from openvclip.checkpoints.translation import Source

_TOWER_NAMES = {
    "vision": {
        "embeddings.class_embedding": "visual.class_embedding",
        "embeddings.patch_embedding.weight": "visual.conv1.weight",
        "embeddings.position_embedding.weight": "visual.positional_embedding",
        "pre_layrnorm.weight": "visual.ln_pre.weight",
        "pre_layrnorm.bias": "visual.ln_pre.bias",
        "post_layernorm.weight": "visual.ln_post.weight",
        "post_layernorm.bias": "visual.ln_post.bias",
    },
    "text": {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    },
}
_BLOCKS = {"vision": "visual.transformer.resblocks", "text": "transformer.resblocks"}
_BLOCK_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_QKV = ("q_proj", "k_proj", "v_proj")  # in the order of their rows in in_proj_weight
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def open_clip_name(path: Path, backbone: str | None) -> str | None:
    """Return open_clip's name of a CLIP of Hugging Face, or ``None`` if it is not known.

    Args:
        path: the file of weights. ``config.json`` beside it names the activation.
        backbone: the backbone, such as ``"ViT-B-16"``, as the shapes of the weights show it.
    """
    try:
        config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
        activation = config["vision_config"].get("hidden_act", "quick_gelu")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if backbone is None:
        return None
    return f"{backbone}-quickgelu" if activation == "quick_gelu" else backbone


def is_hugging_face(names: Collection[str]) -> bool:
    """Return whether the names are those of Hugging Face's CLIP or of one of its towers.

    The result is False for SigLIP and BERT. SigLIP has no class embedding in its image tower, and
    its text tower has a head. BERT has other names for the final layer norm.
    """
    entries = frozenset(names)
    for prefix in ("vision_model.", ""):
        if {f"{prefix}embeddings.class_embedding", f"{prefix}pre_layrnorm.weight"} <= entries:
            return True
    if any(name.startswith("vision_model.") for name in names):
        return False
    for prefix in ("text_model.", ""):
        tower = {f"{prefix}embeddings.token_embedding.weight", f"{prefix}final_layer_norm.weight"}
        if tower <= entries and f"{prefix}head.weight" not in entries:
            return True
    return False


def from_hugging_face(names: Collection[str]) -> dict[str, Source]:
    """Rename entries, join query, key and value weights, and transpose projections."""
    entries = frozenset(names)
    targets: dict[str, Source] = {}
    for name in names:
        translated = _translate(name, entries)
        if translated is not None and entries.issuperset(translated[1].names):
            targets[translated[0]] = translated[1]
    return targets


def _translate(name: str, entries: frozenset[str]) -> tuple[str, Source] | None:
    if name == "logit_scale":
        return name, Source((name,))
    if name in ("visual_projection.weight", "text_projection.weight"):
        target = "visual.proj" if name.startswith("visual") else "text_projection"
        return target, Source((name,), transposed=True)
    tower, prefix = _tower_of(name, entries)
    inner = name.removeprefix(prefix)
    if inner in _TOWER_NAMES[tower]:
        return _TOWER_NAMES[tower][inner], Source((name,))
    layer = _LAYER.fullmatch(inner)
    if layer is None:
        return None
    number, part, kind = layer.groups()
    block = f"{_BLOCKS[tower]}.{number}"
    if part in _BLOCK_NAMES:
        return f"{block}.{_BLOCK_NAMES[part]}.{kind}", Source((name,))
    if part.removeprefix("self_attn.") in _QKV:
        attention = f"{prefix}encoder.layers.{number}.self_attn"
        qkv_names = tuple(f"{attention}.{projection}.{kind}" for projection in _QKV)
        return f"{block}.attn.in_proj_{kind}", Source(qkv_names)
    return None


def _tower_of(name: str, entries: frozenset[str]) -> tuple[str, str]:
    """Return the tower of an entry and the prefix of the tower's names.

    The names of a tower that is saved alone have no prefix.
    """
    for tower in ("vision", "text"):
        if name.startswith(f"{tower}_model."):
            return tower, f"{tower}_model."
    return ("vision" if "embeddings.class_embedding" in entries else "text"), ""
