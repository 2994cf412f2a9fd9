"""Vita-CLIP (Wasim et al., CVPR 2023): a frozen CLIP with prompts that know of the clip."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import PromptOptionError, VideoShapeError
from openvclip.models.classifier import require_names
from openvclip.prompting.attach import Model, Prompts, attach, require_unprompted
from openvclip.prompting.text import (
    NamePosition,
    TextPrompts,
    require_count,
    require_text_tower,
)
from openvclip.towers.prompted import TowerFacts, VisionPrompts, find_tower

OtherLength = Literal["error", "nearest"]


def attach_vita(
    model: Model,
    *,
    frames: int = 8,
    global_prompts: int = 8,
    local_prompts: bool = True,
    summary_prompt: bool = True,
    time_embedding: bool = True,
    text_prompts: int = 8,
    class_names: Sequence[str] | None = None,
    name_at: NamePosition = "end",
    other_length: OtherLength = "error",
    released_freeze: bool = False,
) -> Model:
    """Freeze a model and give it the prompts of Vita-CLIP to learn, in place.

    The image tower's prompts take part in the attention of a layer, in every layer, and are gone
    after it:

    - *global* prompts, learned for each layer;
    - *local* prompts, one a frame: a learned vector plus a projection of the frame's class token;
      each frame sees those of all frames;
    - a *summary* prompt: attention over the projected class tokens of all frames.

    The time embedding is added to all tokens of a frame before the first layer. Every part can be
    left out. In a tower without a class token (SigLIP, ViTamin) the mean of a frame's patch tokens
    takes its place; the paper knows no such tower.

    Args:
        model: an open_clip model; or with ``text_prompts=0`` any model that
            :func:`openvclip.expand_temporal_attention` takes, expanded or not.
        frames: T, the frames of a clip.
        global_prompts: global prompts of a layer; 0 for none.
        local_prompts: whether there are local prompts.
        summary_prompt: whether there is a summary prompt.
        time_embedding: whether there is a time embedding.
        text_prompts: prompts of each text; 0 leaves the text tower as it is.
        class_names: the classes that each have text prompts of their own, which then serve these
            classes alone; None for prompts that all classes share, the ones for zero-shot use.
        name_at: where the class name stands among the text prompts: at the ``"end"``, in the
            ``"middle"`` or at the ``"front"``.
        other_length: what happens to clips of another length where there is a time embedding or
            local prompts. ``"error"``; or ``"nearest"``: each frame takes the vector that is
            nearest in time (the release does so with the time embedding).
        released_freeze: leave the projection of the class tokens at its random start, as the
            release does without meaning to. Here it is trained.

    Returns:
        ``model`` itself. Its parameters are frozen; :func:`openvclip.prompting.parameters` gives
        what is trained.

    Raises:
        PromptingError: the model has prompts already.
        PromptOptionError: an argument is out of range, among them more prompts than the text
            context holds.
        ClassNamesError: ``class_names`` has no names, or empty or duplicate ones.
        UnsupportedModelError: the model has no tower that takes prompts.
    """
    require_unprompted(model)
    require_count("global_prompts", global_prompts)
    require_count("text_prompts", text_prompts)
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise PromptOptionError(f"frames={frames!r}: expected the frames of a clip, 1 or more.")
    if other_length not in get_args(OtherLength):
        raise PromptOptionError(f"other_length={other_length!r}: expected 'error' or 'nearest'.")
    names = None if class_names is None else require_names(class_names)
    visual: dict[str, Any] = {
        "frames": frames,
        "global_prompts": global_prompts,
        "local_prompts": local_prompts,
        "summary_prompt": summary_prompt,
        "time_embedding": time_embedding,
        "other_length": other_length,
        "released_freeze": released_freeze,
    }
    text = _text_prompts(model, text_prompts, names, name_at)
    vision = None
    if global_prompts or local_prompts or summary_prompt or time_embedding:
        vision = VitaVisionPrompts(find_tower(model).facts, **visual)
    if vision is None and text is None:
        raise PromptOptionError("Every kind of prompt is left out: nothing would be learned.")
    textual = {"text_prompts": text_prompts, "class_names": names, "name_at": name_at}
    attach(model, Prompts("vita", {**visual, **textual}, vision, text))
    return model


def _text_prompts(
    model: nn.Module, count: int, class_names: list[str] | None, name_at: NamePosition
) -> TextPrompts | None:
    if count == 0:
        if class_names is not None:
            raise PromptOptionError("class_names are for text prompts; text_prompts=0 gives none.")
        return None
    reader = require_text_tower(model, count, 1)
    return TextPrompts(count, reader.transformer.width, name_at=name_at, class_names=class_names)


class VitaVisionPrompts(VisionPrompts):
    """The visual prompts of Vita-CLIP, each part None where it is left out.

    Attributes:
        global_prompts: ``[layers, n, W]``.
        local_prompts: ``[layers, T, W]``.
        time_embedding: ``[T, W]``.
        cls_proj: for each layer the projection of the class tokens, which local and summary
            prompts share.
        summary: for each layer the attention over frames.
    """

    def __init__(
        self,
        tower: TowerFacts,
        *,
        frames: int,
        global_prompts: int,
        local_prompts: bool,
        summary_prompt: bool,
        time_embedding: bool,
        other_length: OtherLength,
        released_freeze: bool,
    ) -> None:
        super().__init__()
        width, layers = tower.width, tower.layers
        bound = math.sqrt(6 / (3 * math.prod(tower.patch_size) + width))

        def uniform(count: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(layers, count, width).uniform_(-bound, bound))

        self.frames, self.other_length = frames, other_length
        self.class_token, self.prefix = tower.class_token, tower.prefix
        self.global_prompts = uniform(global_prompts) if global_prompts else None
        self.local_prompts = uniform(frames) if local_prompts else None
        self.time_embedding = (
            nn.Parameter(torch.randn(frames, width) * 0.02) if time_embedding else None
        )
        self.cls_proj = self.summary = None
        if local_prompts or summary_prompt:
            self.cls_proj = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
            self.cls_proj.requires_grad_(not released_freeze)
        if summary_prompt:
            self.summary = nn.ModuleList(
                SummaryAttention(width, tower.heads) for _ in range(layers)
            )

    def embed(self, tokens: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """Tokens with each frame's time embedding added."""
        if self.time_embedding is None:
            return norm(tokens)
        time = self._for_clip(self.time_embedding, tokens.shape[1], "time embedding")
        return norm(tokens + time[:, None].to(tokens.dtype))

    def before(self, layer: int, tokens: Tensor) -> Tensor:
        """Tokens with all prompts of a layer after them."""
        frames = tokens.shape[1]
        seen = [tokens]
        if self.global_prompts is not None:
            fixed = self.global_prompts[layer].to(tokens.dtype)
            seen.append(fixed.expand(*tokens.shape[:2], -1, -1))
        if self.cls_proj is not None:
            classes = self.cls_proj[layer](self._of_frames(tokens))  # [B, T, W]
            if self.local_prompts is not None:
                learned = self._for_clip(self.local_prompts[layer], frames, "local prompts")
                local = learned.to(tokens.dtype) + classes
                seen.append(local.unsqueeze(1).expand(-1, frames, -1, -1))
            if self.summary is not None:
                seen.append(self.summary[layer](classes).unsqueeze(2))
        return torch.cat(seen, dim=2)

    def after(self, layer: int, tokens: Tensor) -> Tensor:
        """The tokens without prompts."""
        count = self._count(tokens.shape[1])
        return tokens[:, :, : tokens.shape[2] - count]

    def _of_frames(self, tokens: Tensor) -> Tensor:
        """What stands for each frame, ``[B, T, W]``."""
        if self.class_token:
            return tokens[:, :, 0]
        return tokens[:, :, self.prefix :].mean(dim=2)

    def _count(self, frames: int) -> int:
        fixed = 0 if self.global_prompts is None else self.global_prompts.shape[1]
        local = 0 if self.local_prompts is None else frames
        return fixed + local + (self.summary is not None)

    def _for_clip(self, learned: Tensor, frames: int, what: str) -> Tensor:
        """A vector for each frame, ``[T, W]``, of clips of any length where that is allowed."""
        if frames == self.frames:
            return learned
        if self.other_length == "error":
            raise VideoShapeError(
                f"Got clips of {frames} frames (an image is a clip of one); the {what} of this "
                f"model {'is' if what == 'time embedding' else 'are'} for {self.frames}. Sample "
                f"{self.frames} frames a clip, or attach with other_length='nearest'."
            )
        return functional.interpolate(learned.T[None], size=frames, mode="nearest")[0].T


class SummaryAttention(nn.Module):
    """A summary of a clip for each of its frames: ``x + attention(norm(x))`` over ``[B, T, W]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        for weight in (*self.attn.in_proj_weight.chunk(3), self.attn.out_proj.weight):
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """The projected class tokens of all frames, each with what it saw of the others."""
        normed = self.norm(x)
        out: Tensor = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return out
