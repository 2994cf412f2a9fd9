"""Rebuilding the image towers of ViFi-CLIP's and Vita-CLIP's released checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping

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
    """An image tower with the prompts of its release.

    Attributes:
        visual: open_clip's ``VisionTransformer``. Its weights fit every CLIP with a tower of this
            size.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Return one feature per frame.

        Both releases average the features over T and normalise the mean.

        Args:
            image: videos ``[B, T, C, H, W]`` with normalised frames, floating point.
            normalize: whether to L2-normalise the feature of each frame. Default: False.

        Returns:
            Tensor ``[B, T, D]``.

        Raises:
            VideoShapeError: if ``image`` is not a video of the tower's frame size.
        """
        features = encode_frames(self.visual, image)
        return functional.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor) -> Tensor:
        """Return :meth:`encode_image` of ``image``."""
        return self.encode_image(image)


def load_released(state_dict: Mapping[str, Tensor], *, heads: int | None = None) -> nn.Module:
    """Rebuild the image tower of a released ViFi-CLIP or Vita-CLIP checkpoint.

    The names and shapes of the entries determine the method, the sizes, and the kinds of prompts.
    The checkpoint of a fine-tuned ViFi-CLIP has no prompts. The result holds open_clip's tower with
    QuickGELU, because both methods were trained with QuickGELU. The result can be used like a model
    with attached prompts. The bias of Vita-CLIP's patch embedding is added to the positional
    embedding.

    Args:
        state_dict: entries with their released names. The names can begin with ``visual.`` or
            ``image_encoder.``, and with prefixes of wrappers (``module.``). Entries of the text
            side (``prompt_learner.*``, ``text_encoder.*``, ``textual.*``) are ignored.
        heads: number of attention heads. Default: width / 64.

    Returns:
        A module in eval mode, on the device of the entries. Its ``encode_image(video)`` returns one
        feature per frame: ``[B, T, C, H, W]`` to ``[B, T, D]``. If the checkpoint has prompts, all
        other parameters are frozen. The time embedding and the local prompts of Vita-CLIP support
        clips of any length: each frame gets the vector that is nearest in time. The released code
        does the same for the time embedding. For local and summary prompts, the released code
        splits the frames of a batch into groups of the trained length, even if the clips have
        another length. This function does not do so.

    Raises:
        WeightTypeError: if ``state_dict`` is not a mapping of names to tensors.
        CheckpointError: if the entries belong to neither method.
        StateMismatchError: if entries are missing, unexpected or of the wrong shape.
        PromptOptionError: if ``heads`` does not divide the width. With the default of ``heads``: if
            64 does not divide the width.

    Example:
        >>> checkpoint = torch.load("vifi_clip.pth", weights_only=True)["model"]
        >>> features = load_released(checkpoint).encode_image(video)
    """
    weights, prompts = split_image_side(canonical_state(state_dict, "state_dict"))
    model = ReleasedTower(_build_tower(weights, heads)).eval()
    require_match(
        model.visual.state_dict(),
        weights,
        "The entries of the image tower do not fit open_clip's VisionTransformer.",
    )
    model.visual.load_state_dict(weights)
    if prompts:
        if "tokens" in prompts:
            _attach_vifi(model, prompts)
        else:
            _attach_vita(model, prompts)
        load_state_dict(model, {f"{NAMESPACE}.vision.{name}": v for name, v in prompts.items()})
    return model


def released_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the entries of a released checkpoint to those of open_clip's ``CLIP`` with prompts.

    The result holds the weights of both towers (``visual.*`` and the text tower) and the prompts
    (``openvclip_prompts.*``). ViFi-CLIP's checkpoints do not contain ``token_embedding.weight``,
    because ViFi-CLIP does not train it. Take this entry from CLIP. Both releases store the
    tokenized class names beside the prompts. These entries are left out.

    Args:
        state_dict: entries with their released names, see :func:`load_released`.

    Returns:
        A state dict. Entries that are only renamed are not copied.

    Raises:
        WeightTypeError: see :func:`load_released`.
        CheckpointError: see :func:`load_released`.
        StateMismatchError: see :func:`load_released`.
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


def _attach_vifi(model: nn.Module, prompts: Mapping[str, Tensor]) -> None:
    depth, count, _ = prompts["tokens"].shape
    attach_vifi(model, vision_prompts=count, vision_depth=depth, text_prompts=0)


def _attach_vita(model: nn.Module, prompts: Mapping[str, Tensor]) -> None:
    per_frame = [prompts[n].shape[-2] for n in ("time_embedding", "local_prompts") if n in prompts]
    attach_vita(
        model,
        frames=per_frame[0] if per_frame else 1,
        global_prompts=prompts["global_prompts"].shape[1] if "global_prompts" in prompts else 0,
        local_prompts="local_prompts" in prompts,
        summary_prompt=any(name.startswith("summary.") for name in prompts),
        time_embedding="time_embedding" in prompts,
        text_prompts=0,
        other_length="nearest",
    )


def _build_tower(weights: Mapping[str, Tensor], heads: int | None) -> nn.Module:
    """Return an open_clip ``VisionTransformer`` with the sizes of the entries.

    Raises:
        StateMismatchError: if the sizes can't be read from the entries.
        PromptOptionError: if the number of heads does not fit.
    """
    from openvclip.towers.open_clip import quick_gelu_tower

    hidden_name = "transformer.resblocks.0.mlp.c_fc.weight"
    _require_ranks(
        weights, {"conv1.weight": 4, "positional_embedding": 2, "proj": 2, hidden_name: 2}
    )
    conv, position = weights["conv1.weight"], weights["positional_embedding"]
    width = conv.shape[0]
    side = math.isqrt(position.shape[0] - 1)
    if side**2 != position.shape[0] - 1 or conv.shape[2] != conv.shape[3]:
        raise StateMismatchError(
            f"positional_embedding has {position.shape[0]} rows, and conv1.weight has patches of "
            f"{list(conv.shape[2:])} pixels; expected one row for the class token plus a square "
            "number of rows, and square patches."
        )
    tower = quick_gelu_tower(
        image_size=side * conv.shape[2],
        patch_size=conv.shape[2],
        width=width,
        layers=layer_count(weights),
        heads=_heads(width, heads),
        # The tower rounds width * ratio down.
        mlp_ratio=(weights[hidden_name].shape[0] + 0.5) / width,
        output_dim=weights["proj"].shape[1],
    )
    return tower.to(conv.device, conv.dtype)


def _require_ranks(weights: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
    """Raise :class:`StateMismatchError` unless the entries exist and have these numbers of axes."""
    missing = [name for name in ranks if name not in weights]
    wrong = [n for n, rank in ranks.items() if n in weights and weights[n].ndim != rank]
    if missing or wrong:
        shapes = "".join(
            f" {name} has shape {list(weights[name].shape)}; expected {ranks[name]} axes."
            for name in wrong
        )
        raise StateMismatchError(
            f"The sizes of the image tower can't be read from the entries.{shapes}",
            missing=missing,
        )


def _heads(width: int, heads: int | None) -> int:
    count = width // _HEAD_WIDTH if heads is None else heads
    if count < 1 or width % count or (heads is None and width % _HEAD_WIDTH):
        reason = f" The default, width / {_HEAD_WIDTH}, is no integer." if heads is None else ""
        raise PromptOptionError(
            f"heads={heads}: the tower is {width} wide; expected a number that divides the width."
            f"{reason}"
        )
    return count
