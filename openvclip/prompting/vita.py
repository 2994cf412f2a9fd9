"""Vita-CLIP (Wasim et al., CVPR 2023): a frozen CLIP with prompts that connect the frames."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import PromptOptionError, VideoShapeError
from openvclip.models.classifier import require_names
from openvclip.prompting.attach import Model, Prompts, attach, require_unprompted
from openvclip.prompting.text import INIT_STD, NamePosition, TextPrompts
from openvclip.prompting.text_towers import require_count, require_text_tower
from openvclip.towers.families import tower_facts
from openvclip.towers.family import TowerFacts
from openvclip.towers.prompted import VisionPrompts

OtherLength = Literal["error", "nearest"]
"""How Vita-CLIP treats clips with another number of frames than its prompts."""


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
    """Freeze a model and attach the prompts of Vita-CLIP, in place.

    Every layer of the image tower has three kinds of prompts. They take part in the attention of
    the layer, and are removed after the layer.

    - *Global* prompts are learned for each layer.
    - *Local* prompts, one per frame, are the sum of a learned vector and a projection of the
      frame's class token. Each frame attends to the local prompts of all frames.
    - The *summary* prompt of a frame is the output of attention over the projected class tokens of
      all frames.

    In addition, a time embedding is added to all tokens of a frame before the first layer. Each
    part can be switched off. For a tower without a class token (SigLIP, ViTamin), the mean of the
    frame's patch tokens is used instead. The paper does not describe such towers.

    Args:
        model: an open_clip model, or a model of transformers such as ``CLIPModel`` or
            ``SiglipModel``. With ``text_prompts=0``: any model that
            :func:`openvclip.expand_temporal_attention` supports, expanded or not.
        frames: number of frames in a clip, T. Default: 8.
        global_prompts: number of global prompts in each layer. With 0 there are none. Default: 8.
        local_prompts: whether to use local prompts. Default: True.
        summary_prompt: whether to use the summary prompt. Default: True.
        time_embedding: whether to use the time embedding. Default: True.
        text_prompts: number of prompts in each text. With 0 the text tower gets no prompts.
            Default: 8.
        class_names: class names that each get their own text prompts. These prompts support only
            the given classes. Default: all classes share the prompts, as zero-shot use requires.
        name_at: place of the class name among the text prompts: ``"end"``, ``"middle"`` or
            ``"front"``. Default: ``"end"``.
        other_length: how clips with another number of frames are treated if there are local prompts
            or a time embedding. ``"error"`` raises an error. ``"nearest"`` gives each frame the
            vector that is nearest in time, as the release does for the time embedding.
            Default: ``"error"``.
        released_freeze: whether to freeze the projection of the class tokens at its random
            initialisation. The release does so unintentionally. Default: False, so the projection
            is trained.

    Returns:
        ``model``. Its parameters are frozen. :func:`openvclip.prompting.parameters` returns the
        trained parameters of the prompts.

    Raises:
        PromptingError: if the model has prompts already.
        PromptOptionError: if an argument is out of range, or if the prompts exceed the text
            context.
        ClassNamesError: if ``class_names`` has no names, or empty or duplicate names.
        UnsupportedModelError: if the model has no tower that supports prompts.
    """
    require_unprompted(model)
    require_count("text_prompts", text_prompts)
    visual = VitaVisionSettings(
        frames=frames,
        global_prompts=global_prompts,
        local_prompts=local_prompts,
        summary_prompt=summary_prompt,
        time_embedding=time_embedding,
        other_length=other_length,
        released_freeze=released_freeze,
    )
    names = None if class_names is None else require_names(class_names)
    text = _text_prompts(model, text_prompts, names, name_at)
    vision = VitaVisionPrompts(tower_facts(model), visual) if visual.any_part else None
    if vision is None and text is None:
        raise PromptOptionError(
            "Every kind of prompts is switched off: nothing would be learned. Switch one on."
        )
    textual = {"text_prompts": text_prompts, "class_names": names, "name_at": name_at}
    attach(model, Prompts("vita", {**asdict(visual), **textual}, vision, text))
    return model


def _text_prompts(
    model: nn.Module, count: int, class_names: list[str] | None, name_at: NamePosition
) -> TextPrompts | None:
    if count == 0:
        if class_names is not None:
            raise PromptOptionError(
                "class_names are for text prompts; text_prompts=0 gives none. Remove class_names, "
                "or set text_prompts to 1 or more."
            )
        return None
    tower = require_text_tower(model, count, 1)
    return TextPrompts(count, tower.width, name_at=name_at, class_names=class_names)


@dataclass(frozen=True)
class VitaVisionSettings:
    """The arguments of :func:`attach_vita` for the image tower.

    Raises:
        PromptOptionError: if a value is out of range.
    """

    frames: int
    global_prompts: int
    local_prompts: bool
    summary_prompt: bool
    time_embedding: bool
    other_length: OtherLength
    released_freeze: bool

    def __post_init__(self) -> None:
        require_count("global_prompts", self.global_prompts)
        if isinstance(self.frames, bool) or not isinstance(self.frames, int) or self.frames < 1:
            raise PromptOptionError(
                f"frames={self.frames!r}: expected the number of frames in a clip, 1 or more."
            )
        if self.other_length not in get_args(OtherLength):
            raise PromptOptionError(
                f"other_length={self.other_length!r}: expected 'error' or 'nearest'."
            )

    @property
    def any_part(self) -> bool:
        """Whether a kind of prompts or the time embedding is switched on."""
        parts = (self.global_prompts, self.local_prompts, self.summary_prompt, self.time_embedding)
        return any(parts)


class VitaVisionPrompts(VisionPrompts):
    """The vision prompts of Vita-CLIP. Parts that are switched off are None.

    Attributes:
        global_prompts: ``[layers, n, W]``.
        local_prompts: ``[layers, T, W]``.
        time_embedding: ``[T, W]``.
        cls_proj: for each layer the projection of the class tokens, which local and summary
            prompts share.
        summary: for each layer the attention over frames.
    """

    def __init__(self, tower: TowerFacts, settings: VitaVisionSettings) -> None:
        super().__init__()
        width, layers, frames = tower.width, tower.layers, settings.frames
        bound = math.sqrt(6 / (3 * math.prod(tower.patch_size) + width))

        def uniform(count: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(layers, count, width).uniform_(-bound, bound))

        self.frames, self.other_length = frames, settings.other_length
        self.class_token, self.prefix = tower.class_token, tower.prefix
        self.global_prompts = uniform(settings.global_prompts) if settings.global_prompts else None
        self.local_prompts = uniform(frames) if settings.local_prompts else None
        self.time_embedding = (
            nn.Parameter(torch.randn(frames, width) * INIT_STD) if settings.time_embedding else None
        )
        self.cls_proj = self.summary = None
        if settings.local_prompts or settings.summary_prompt:
            self.cls_proj = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
            self.cls_proj.requires_grad_(not settings.released_freeze)
        if settings.summary_prompt:
            self.summary = nn.ModuleList(
                SummaryAttention(width, tower.heads) for _ in range(layers)
            )

    @property
    def fixed_frames(self) -> int | None:
        """T, if a part has a vector for each frame."""
        by_frame = self.time_embedding is not None or self.local_prompts is not None
        return self.frames if by_frame else None

    def embed(self, tokens: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the tokens plus the time embedding of their frame."""
        if self.time_embedding is None:
            return norm(tokens)
        time = self._for_clip(self.time_embedding, tokens.shape[1], "time embedding")
        return norm(tokens + time[:, None].to(tokens.dtype))

    def before_layer(self, layer: int, tokens: Tensor) -> Tensor:
        """Return the tokens followed by all prompts of a layer."""
        frames = tokens.shape[1]
        parts = [tokens]
        if self.global_prompts is not None:
            learned = self.global_prompts[layer].to(tokens.dtype)
            parts.append(learned.expand(*tokens.shape[:2], -1, -1))
        if self.cls_proj is not None:
            classes = self.cls_proj[layer](self._class_tokens(tokens))  # [B, T, W]
            if self.local_prompts is not None:
                learned = self._for_clip(self.local_prompts[layer], frames, "local prompts")
                local = learned.to(tokens.dtype) + classes
                parts.append(local.unsqueeze(1).expand(-1, frames, -1, -1))
            if self.summary is not None:
                parts.append(self.summary[layer](classes).unsqueeze(2))
        return torch.cat(parts, dim=2)

    def after_layer(self, layer: int, tokens: Tensor) -> Tensor:
        """Return the tokens without the prompts."""
        return tokens[:, :, : tokens.shape[2] - self._count(tokens.shape[1])]

    def _class_tokens(self, tokens: Tensor) -> Tensor:
        """Return the class token of each frame, or the mean of its patch tokens: ``[B, T, W]``."""
        if self.class_token:
            return tokens[:, :, 0]
        return tokens[:, :, self.prefix :].mean(dim=2)

    def _count(self, frames: int) -> int:
        """Return the number of prompts in a frame."""
        n_global = 0 if self.global_prompts is None else self.global_prompts.shape[1]
        n_local = 0 if self.local_prompts is None else frames
        return n_global + n_local + int(self.summary is not None)  # torch.jit.trace adds no bool

    def _for_clip(self, learned: Tensor, frames: int, name: str) -> Tensor:
        """Return the learned vectors ``[T, W]`` for a clip of ``frames`` frames.

        Raises:
            VideoShapeError: if ``frames`` differs from T and ``other_length`` is ``"error"``.
        """
        if frames == self.frames:
            return learned
        if self.other_length == "error":
            raise VideoShapeError(
                f"Got clips of {frames} frames (an image is a clip of one); the {name} of this "
                f"model {'is' if name == 'time embedding' else 'are'} for {self.frames}. Sample "
                f"{self.frames} frames a clip, or attach with other_length='nearest'."
            )
        return functional.interpolate(learned.T[None], size=frames, mode="nearest")[0].T


class SummaryAttention(nn.Module):
    """Attention over the frames of a clip, with a residual: ``x + attention(norm(x))``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        for weight in (*self.attn.in_proj_weight.chunk(3), self.attn.out_proj.weight):
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the summary prompt of each frame ``[B, T, W]``.

        Args:
            x: projected class tokens ``[B, T, W]``.
        """
        normed = self.norm(x)
        out: Tensor = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return out
