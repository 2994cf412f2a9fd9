"""The image towers of ViFi-CLIP's and Vita-CLIP's released checkpoints, from names and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import CheckpointError, PromptOptionError, StateMismatchError
from openvclip.prompting.attach import NAMESPACE, load_state_dict
from openvclip.prompting.vifi import attach_vifi
from openvclip.prompting.vita import attach_vita
from openvclip.towers.temporal import encode_frames
from openvclip.weights.names import canonical_state, require_match

_PREFIXES = ("visual.", "image_encoder.")
_NOT_IMAGES = ("textual.", "text_encoder.", "prompt_learner.", "logit_scale")

_VITA_NAMES = (
    ("patch_embed.proj.", "conv1."),
    ("cls_token", "class_embedding"),
    ("pos_embed", "positional_embedding"),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
_BLOCK = "transformer.resblocks."
_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_VITA_PROMPTS = {"global_prompts": "global_prompts", "time_embed": "time_embedding"}
_VITA_LAYER_PROMPTS = ("cls_proj.", "summary_ln.", "summary_attn_layer.")

_HEAD_WIDTH = 64


class ReleasedTower(nn.Module):
    """An image tower with the prompts that it was released with.

    Attributes:
        visual: open_clip's ``VisionTransformer``; its weights go into any CLIP of that size.
    """

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """One feature a frame, ``[B, T, D]``, of videos ``[B, T, C, H, W]``.

        Their mean over T is what both releases pool, before they normalise it.

        Args:
            image: normalised frames, floating point.
            normalize: whether each frame's feature gets unit length.

        Raises:
            VideoShapeError: no video of the tower's frame size.
        """
        frames = encode_frames(self.visual, image)
        return functional.normalize(frames, dim=-1) if normalize else frames

    def forward(self, image: Tensor) -> Tensor:
        """:meth:`encode_image`."""
        return self.encode_image(image)


def load_released(state_dict: Mapping[str, Tensor], *, heads: int | None = None) -> nn.Module:
    """Rebuild the image tower of a released ViFi-CLIP or Vita-CLIP checkpoint.

    Everything comes from names and shapes: the sizes, which of the two it is, and which of the
    prompts it holds (none, for a ViFi-CLIP that was fine-tuned only). The result has open_clip's
    tower with QuickGELU, which both were trained with, and takes part in everything that a model
    with attached prompts does. The bias that Vita-CLIP's patch embedding has is added to
    the positions.

    Args:
        state_dict: the released names, with a ``visual.`` or ``image_encoder.`` before them or
            without, and with the prefixes of wrappers (``module.``) or without. Entries of the
            text side (``prompt_learner.*``, ``text_encoder.*``, ``textual.*``) are left aside.
        heads: attention heads; width / 64 by default.

    Returns:
        A module in eval mode, whose ``encode_image(video)`` gives one feature a frame:
        ``[B, T, C, H, W]`` to ``[B, T, D]``. Where it has prompts all else is frozen. Vita-CLIP's
        time embedding and local prompts go with clips of any length: each frame takes the vector
        nearest in time. (The release does so with the time embedding; its local and summary
        prompts regroup the frames of clips of another length, which is not repeated here.)

    Raises:
        WeightTypeError: ``state_dict`` is not a mapping of names to tensors.
        CheckpointError: it is of neither model.
        StateMismatchError: entries are missing, left over or of shapes that do not fit.
        PromptOptionError: the number of heads is not known or does not divide the width.

    Example:
        >>> checkpoint = torch.load("vifi_clip.pth", weights_only=True)["model"]
        >>> features = load_released(checkpoint).encode_image(video)
    """
    weights, prompts = _image_side(canonical_state(state_dict, "state_dict"))
    model = ReleasedTower(_tower(weights, heads)).eval()
    require_match(
        model.visual.state_dict(), weights, "The entries are not those of one image tower."
    )
    model.visual.load_state_dict(weights)
    if prompts:
        attach = _attach_vifi if "tokens" in prompts else _attach_vita
        attach(model, prompts)
        load_state_dict(model, {f"{NAMESPACE}.vision.{name}": v for name, v in prompts.items()})
    return model


def released_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released checkpoint under the names of open_clip's ``CLIP`` with prompts attached.

    For both towers: the weights (``visual.*`` and the text side) and the prompts
    (``openvclip_prompts.*``). ViFi-CLIP's checkpoints hold no ``token_embedding.weight``, since it
    is CLIP's own; the texts of their classes, which both keep beside the prompts, are left out.

    Args:
        state_dict: as for :func:`load_released`.

    Returns:
        Names to tensors; those that only change names are not copied.

    Raises:
        WeightTypeError, CheckpointError, StateMismatchError: as for :func:`load_released`.
    """
    state = canonical_state(state_dict, "state_dict")
    weights, prompts = _image_side(state)
    found = {f"visual.{name}": value for name, value in weights.items()}
    found |= {f"{NAMESPACE}.vision.{name}": value for name, value in prompts.items()}
    deep: dict[str, Tensor] = {}
    for raw, value in state.items():
        name = raw.removeprefix("text_encoder.").removeprefix("textual.")
        if name != raw:
            (deep if "VPT" in name else found)[name] = value
    if deep:
        wanted = [f"{_BLOCK}{i}.VPT_shallow" for i in range(1, 1 + len(deep))]
        found[f"{NAMESPACE}.text.deep"] = _stacked(deep, wanted)
    for raw, name in (
        ("logit_scale", "logit_scale"),
        ("prompt_learner.ctx", f"{NAMESPACE}.text.context"),
    ):
        if raw in state:
            found[name] = state[raw]
    return found


def _image_side(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The image tower's weights, and its prompts, under the names that they have here."""
    entries = _image_entries(state)
    if "patch_embed.proj.weight" in entries:
        return _from_vita(entries)
    if "conv1.weight" in entries:
        return _from_vifi(entries)
    raise CheckpointError(
        "The entries are neither ViFi-CLIP's (conv1.weight, with VPT where it has prompts) nor "
        f"Vita-CLIP's (patch_embed.proj.weight): {', '.join(list(entries)[:3]) or 'none'}."
    )


def _image_entries(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of the image tower, without what stands before their names."""
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in state):
            return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    return {name: value for name, value in state.items() if not name.startswith(_NOT_IMAGES)}


# --- ViFi-CLIP ---------------------------------------------------------------------------------


def _from_vifi(entries: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights = {name: value for name, value in entries.items() if "VPT" not in name}
    found = {name: value for name, value in entries.items() if "VPT" in name}
    if not found:
        return weights, {}
    wanted = ["VPT", *(f"{_BLOCK}{i}.VPT_shallow" for i in range(1, len(found)))]
    return weights, {"tokens": _stacked(found, wanted)}


def _attach_vifi(model: nn.Module, prompts: Mapping[str, Tensor]) -> None:
    depth, count, _ = prompts["tokens"].shape
    attach_vifi(model, vision_prompts=count, vision_depth=depth, text_prompts=0)


# --- Vita-CLIP ---------------------------------------------------------------------------------


def _from_vita(entries: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights: dict[str, Tensor] = {}
    prompts: dict[str, Tensor] = {}
    local: dict[str, Tensor] = {}
    for raw, value in entries.items():
        name = _vita_name(raw)
        layer = _LAYER.fullmatch(name)
        if raw in _VITA_PROMPTS:
            prompts[_VITA_PROMPTS[raw]] = value
        elif layer and layer[2] == "local_prompts":
            local[name] = value
        elif layer and layer[2].startswith(_VITA_LAYER_PROMPTS):
            prompts[_vita_prompt_name(int(layer[1]), layer[2])] = value
        else:
            weights[name] = value
    if local:
        wanted = [f"{_BLOCK}{i}.local_prompts" for i in range(_layers(weights))]
        prompts["local_prompts"] = _stacked(local, wanted).flatten(1, -2)
    elif not any(name.startswith("summary.") for name in prompts):
        # A projection that is read by nothing has no effect.
        prompts = {n: v for n, v in prompts.items() if not n.startswith("cls_proj.")}
    return _with_bias_in_positions(_joined(weights)), _joined(prompts)


def _with_bias_in_positions(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    bias = weights.pop("conv1.bias", None)
    if bias is not None and "positional_embedding" in weights:
        position = weights["positional_embedding"].clone()
        position[1:] += bias
        weights["positional_embedding"] = position
    return weights


def _vita_name(name: str) -> str:
    for released, ours in _VITA_NAMES:
        name = name.replace(released, ours)
    return _BLOCK + name.removeprefix("blocks.") if name.startswith("blocks.") else name


def _vita_prompt_name(layer: int, part: str) -> str:
    part = part.replace("cls_proj.", "").replace("summary_ln.", "norm.")
    inside = part.startswith(("norm.", "summary_attn_layer."))
    part = part.replace("summary_attn_layer.", "attn.")
    return f"{'summary' if inside else 'cls_proj'}.{layer}.{part}"


def _joined(entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with query, key and value weights joined as ``nn.MultiheadAttention`` has them."""
    joined = dict(entries)
    for name in entries:
        three = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if ".q_proj." in name and all(part in entries for part in three):
            whole = torch.cat([joined.pop(part) for part in three])
            joined[name.replace(".q_proj.", ".in_proj_")] = whole
    return joined


def _attach_vita(model: nn.Module, prompts: Mapping[str, Tensor]) -> None:
    of_frames = [prompts[n].shape[-2] for n in ("time_embedding", "local_prompts") if n in prompts]
    fixed = prompts.get("global_prompts")
    attach_vita(
        model,
        frames=of_frames[0] if of_frames else 1,
        global_prompts=0 if fixed is None else fixed.shape[1],
        local_prompts="local_prompts" in prompts,
        summary_prompt=any(name.startswith("summary.") for name in prompts),
        time_embedding="time_embedding" in prompts,
        text_prompts=0,
        other_length="nearest",
    )


# --- shapes ------------------------------------------------------------------------------------


def _tower(weights: Mapping[str, Tensor], heads: int | None) -> VisionTransformer:
    """A tower of the sizes that the entries have."""
    hidden_name = f"{_BLOCK}0.mlp.c_fc.weight"
    needed = {"conv1.weight": 4, "positional_embedding": 2, "proj": 2, hidden_name: 2}
    missing = [name for name in needed if name not in weights]
    strange = [n for n, rank in needed.items() if n in weights and weights[n].ndim != rank]
    if missing or strange:
        text = "".join(f" {name} has shape {list(weights[name].shape)}." for name in strange)
        raise StateMismatchError(
            f"The sizes of the image tower can't be told from the entries.{text}", missing=missing
        )
    conv, position = weights["conv1.weight"], weights["positional_embedding"]
    width = conv.shape[0]
    side = math.isqrt(position.shape[0] - 1)
    if side**2 != position.shape[0] - 1 or conv.shape[2] != conv.shape[3]:
        raise StateMismatchError(
            f"positional_embedding has {position.shape[0]} rows and conv1.weight patches of "
            f"{list(conv.shape[2:])}; expected one row and a square of patches, square ones."
        )
    tower = VisionTransformer(
        image_size=side * conv.shape[2],
        patch_size=conv.shape[2],
        width=width,
        layers=_layers(weights),
        heads=_heads(width, heads),
        # The tower rounds width * ratio down.
        mlp_ratio=(weights[hidden_name].shape[0] + 0.5) / width,
        output_dim=weights["proj"].shape[1],
        act_layer=QuickGELU,
    )
    return tower.to(conv.dtype)


def _layers(weights: Mapping[str, Tensor]) -> int:
    return 1 + max((int(m[1]) for m in map(_LAYER.fullmatch, weights) if m), default=-1)


def _heads(width: int, heads: int | None) -> int:
    count = width // _HEAD_WIDTH if heads is None else heads
    if count < 1 or width % count or (heads is None and width % _HEAD_WIDTH):
        raise PromptOptionError(
            f"heads={heads}: the tower is {width} wide; expected a number that divides it"
            f"{', since ' + str(_HEAD_WIDTH) + ' does not' if heads is None else ''}."
        )
    return count


def _stacked(entries: Mapping[str, Tensor], wanted: list[str]) -> Tensor:
    """The entries in the order of ``wanted``, as one tensor.

    Raises:
        StateMismatchError: they are not these, or of several shapes.
    """
    if set(entries) != set(wanted) or len({value.shape for value in entries.values()}) > 1:
        raise StateMismatchError(
            "The prompts are not one of a kind for each of the first layers.",
            missing=set(wanted) - set(entries),
            unexpected=set(entries) - set(wanted),
            mismatched=[
                (name, tuple(entries[wanted[0]].shape), tuple(value.shape))
                for name, value in entries.items()
                if wanted[0] in entries and value.shape != entries[wanted[0]].shape
            ],
        )
    return torch.stack([entries[name] for name in wanted])
