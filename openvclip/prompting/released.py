"""The image towers of ViFi-CLIP's and Vita-CLIP's released checkpoints, from names and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from open_clip.transformer import QuickGELU, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from openvclip.checkpoints.released_prompts import (
    layer_count,
    split_image_side,
    split_text_side,
)
from openvclip.errors import PromptOptionError, StateMismatchError
from openvclip.prompting.attach import NAMESPACE, load_state_dict
from openvclip.prompting.vifi import attach_vifi
from openvclip.prompting.vita import attach_vita
from openvclip.towers.temporal import encode_frames
from openvclip.weights.names import canonical_state, require_match

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
    weights, prompts = split_image_side(canonical_state(state_dict, "state_dict"))
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
    weights, image_prompts = split_image_side(state)
    text_weights, text_prompts = split_text_side(state)
    return {
        **{f"visual.{name}": value for name, value in weights.items()},
        **text_weights,
        **{f"{NAMESPACE}.vision.{name}": value for name, value in image_prompts.items()},
        **{f"{NAMESPACE}.text.{name}": value for name, value in text_prompts.items()},
    }


# --- ViFi-CLIP ---------------------------------------------------------------------------------


def _attach_vifi(model: nn.Module, prompts: Mapping[str, Tensor]) -> None:
    depth, count, _ = prompts["tokens"].shape
    attach_vifi(model, vision_prompts=count, vision_depth=depth, text_prompts=0)


# --- Vita-CLIP ---------------------------------------------------------------------------------


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
    hidden_name = "transformer.resblocks.0.mlp.c_fc.weight"
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
        layers=layer_count(weights),
        heads=_heads(width, heads),
        # The tower rounds width * ratio down.
        mlp_ratio=(weights[hidden_name].shape[0] + 0.5) / width,
        output_dim=weights["proj"].shape[1],
        act_layer=QuickGELU,
    )
    return tower.to(conv.dtype)


def _heads(width: int, heads: int | None) -> int:
    count = width // _HEAD_WIDTH if heads is None else heads
    if count < 1 or width % count or (heads is None and width % _HEAD_WIDTH):
        raise PromptOptionError(
            f"heads={heads}: the tower is {width} wide; expected a number that divides it"
            f"{', since ' + str(_HEAD_WIDTH) + ' does not' if heads is None else ''}."
        )
    return count
