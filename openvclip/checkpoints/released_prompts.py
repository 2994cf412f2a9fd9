"""Names of ViFi-CLIP's and Vita-CLIP's released checkpoints, translated to open_clip's names.

Both releases keep prompts beside the weights. Each function here returns the weights and the
prompts as two dictionaries. The prompts have the names of the modules in
:mod:`openvclip.prompting`, which builds a model from them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from openvclip.errors import CheckpointError, StateMismatchError

Entries = dict[str, Tensor]

_VIFI_ENTRY = "conv1.weight"
_VITA_ENTRY = "patch_embed.proj.weight"

_IMAGE_PREFIXES = ("visual.", "image_encoder.")
_TEXT_PREFIXES = ("textual.", "text_encoder.")
_NOT_IMAGE = (*_TEXT_PREFIXES, "prompt_learner.", "logit_scale")

_BLOCK = "transformer.resblocks."
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")


def split_image_side(state: Mapping[str, Tensor]) -> tuple[Entries, Entries]:
    """Return the weights and the prompts of the image tower of a released checkpoint.

    Args:
        state: all entries of the checkpoint, under canonical names.

    Returns:
        The weights, under the names of open_clip's ``VisionTransformer``, and the prompts. An entry
        of which only the name changes is not copied.

    Raises:
        CheckpointError: the checkpoint is neither ViFi-CLIP's nor Vita-CLIP's.
        StateMismatchError: prompts of some layers are missing, or their shapes differ.
    """
    entries = _image_entries(state)
    if _VITA_ENTRY in entries:
        return _split_vita(entries)
    if _VIFI_ENTRY in entries:
        return _split_vifi(entries)
    raise CheckpointError(
        f"The entries are neither ViFi-CLIP's (expected {_VIFI_ENTRY} in the image tower) nor "
        f"Vita-CLIP's (expected {_VITA_ENTRY}). First entries: "
        f"{', '.join(list(entries)[:3]) or 'none'}."
    )


def split_text_side(state: Mapping[str, Tensor]) -> tuple[Entries, Entries]:
    """Return the weights and the prompts of the text tower of a released checkpoint.

    Args:
        state: all entries of the checkpoint, under canonical names.

    Returns:
        The weights and ``logit_scale``, under the names of open_clip's ``CLIP``, and the prompts.

    Raises:
        StateMismatchError: prompts of some layers are missing, or their shapes differ.
    """
    weights: Entries = {}
    deep: Entries = {}
    for released_name, value in state.items():
        name = released_name.removeprefix("text_encoder.").removeprefix("textual.")
        if name != released_name:
            (deep if "VPT" in name else weights)[name] = value
    if "logit_scale" in state:
        weights["logit_scale"] = state["logit_scale"]
    prompts: Entries = {}
    if deep:
        names = [f"{_BLOCK}{i}.VPT_shallow" for i in range(1, 1 + len(deep))]
        prompts["deep"] = _stack(deep, names)
    if "prompt_learner.ctx" in state:
        prompts["context"] = state["prompt_learner.ctx"]
    return weights, prompts


def layer_count(names: Collection[str]) -> int:
    """Return the number of blocks of the transformer whose entries have these names."""
    return 1 + max((int(match[1]) for match in map(_LAYER.fullmatch, names) if match), default=-1)


def _image_entries(state: Mapping[str, Tensor]) -> Entries:
    """Return the entries of the image tower without the prefix of their names."""
    for prefix in _IMAGE_PREFIXES:
        if any(name.startswith(prefix) for name in state):
            return {
                name.removeprefix(prefix): value
                for name, value in state.items()
                if name.startswith(prefix)
            }
    return {name: value for name, value in state.items() if not name.startswith(_NOT_IMAGE)}


def _stack(entries: Mapping[str, Tensor], names: list[str]) -> Tensor:
    """Stack the entries in the order of ``names``.

    Raises:
        StateMismatchError: the entries have other names, or their shapes differ.
    """
    if set(entries) != set(names) or len({value.shape for value in entries.values()}) > 1:
        raise StateMismatchError(
            "The prompts of the layers do not fit together; expected prompts of the same shape in "
            "consecutive layers.",
            missing=set(names) - set(entries),
            unexpected=set(entries) - set(names),
            mismatched=[
                (name, tuple(entries[names[0]].shape), tuple(value.shape))
                for name, value in entries.items()
                if names[0] in entries and value.shape != entries[names[0]].shape
            ],
        )
    return torch.stack([entries[name] for name in names])


# --- ViFi-CLIP ---------------------------------------------------------------------------------


def _split_vifi(entries: Mapping[str, Tensor]) -> tuple[Entries, Entries]:
    weights = {name: value for name, value in entries.items() if "VPT" not in name}
    prompts = {name: value for name, value in entries.items() if "VPT" in name}
    if not prompts:
        return weights, {}
    names = ["VPT", *(f"{_BLOCK}{i}.VPT_shallow" for i in range(1, len(prompts)))]
    return weights, {"tokens": _stack(prompts, names)}


# --- Vita-CLIP ---------------------------------------------------------------------------------

_VITA_NAMES = (
    ("patch_embed.proj.", "conv1."),
    ("cls_token", "class_embedding"),
    ("pos_embed", "positional_embedding"),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
_VITA_PROMPTS = {"global_prompts": "global_prompts", "time_embed": "time_embedding"}
_VITA_LAYER_PROMPTS = ("cls_proj.", "summary_ln.", "summary_attn_layer.")


def _split_vita(entries: Mapping[str, Tensor]) -> tuple[Entries, Entries]:
    weights: Entries = {}
    prompts: Entries = {}
    local: Entries = {}
    for released_name, value in entries.items():
        name = _vita_name(released_name)
        layer = _LAYER.fullmatch(name)
        if released_name in _VITA_PROMPTS:
            prompts[_VITA_PROMPTS[released_name]] = value
        elif layer and layer[2] == "local_prompts":
            local[name] = value
        elif layer and layer[2].startswith(_VITA_LAYER_PROMPTS):
            prompts[_vita_prompt_name(int(layer[1]), layer[2])] = value
        else:
            weights[name] = value
    if local:
        names = [f"{_BLOCK}{i}.local_prompts" for i in range(layer_count(weights))]
        prompts["local_prompts"] = _stack(local, names).flatten(1, -2)
    elif not any(name.startswith("summary.") for name in prompts):
        # Without local and summary prompts, nothing reads the projection of the class tokens.
        prompts = {
            name: value for name, value in prompts.items() if not name.startswith("cls_proj.")
        }
    return _add_bias_to_positions(_join_attention(weights)), _join_attention(prompts)


def _add_bias_to_positions(weights: Entries) -> Entries:
    """Add the bias of Vita-CLIP's patch embedding, which open_clip does not have, to positions."""
    bias = weights.pop("conv1.bias", None)
    if bias is not None and "positional_embedding" in weights:
        position = weights["positional_embedding"].clone()
        position[1:] += bias
        weights["positional_embedding"] = position
    return weights


def _vita_name(released_name: str) -> str:
    name = released_name
    for part, replacement in _VITA_NAMES:
        name = name.replace(part, replacement)
    return _BLOCK + name.removeprefix("blocks.") if name.startswith("blocks.") else name


def _vita_prompt_name(layer: int, part: str) -> str:
    part = part.replace("cls_proj.", "").replace("summary_ln.", "norm.")
    is_summary = part.startswith(("norm.", "summary_attn_layer."))
    part = part.replace("summary_attn_layer.", "attn.")
    return f"{'summary' if is_summary else 'cls_proj'}.{layer}.{part}"


def _join_attention(entries: Mapping[str, Tensor]) -> Entries:
    """Join query, key and value weights, as ``nn.MultiheadAttention`` has them."""
    joined = dict(entries)
    for name in entries:
        qkv_names = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if ".q_proj." in name and all(part in entries for part in qkv_names):
            in_proj = torch.cat([joined.pop(part) for part in qkv_names])
            joined[name.replace(".q_proj.", ".in_proj_")] = in_proj
    return joined
