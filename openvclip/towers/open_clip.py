"""open_clip's ``VisionTransformer`` (OpenAI, LAION, DataComp, MetaCLIP, CoCa, ...).

open_clip's documentation does not describe the parts of its towers. Only this file and
``open_clip_text.py`` use them. ``tests/towers/test_library_names.py`` lists every such name, and
says which name a new version of open_clip no longer has. In open_clip 3, most blocks have an
``nn.MultiheadAttention``. In open_clip 4, every block has open_clip's ``Attention``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import open_clip
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import Attention, QuickGELU, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import UnsupportedModelError
from openvclip.towers.attention import temporal_attention
from openvclip.towers.checks import require_video
from openvclip.towers.family import Encoder, Family, TemporalTower, TowerFacts, call
from openvclip.towers.intermediates import by_clip, frame_tower
from openvclip.towers.prompted import PromptedExpandedTower, PromptedTower
from openvclip.towers.view import FrameView


def _embedded(tower: Any, images: Tensor) -> Tensor:
    """Return class and patch tokens ``[n, N, W]`` with their positions, before ``ln_pre``."""
    patches = tower.conv1(images).flatten(2).transpose(1, 2)
    position = tower.positional_embedding.to(patches.dtype)
    first = tower.class_embedding.to(patches.dtype) + position[0]
    first = first.expand(patches.shape[0], 1, -1)
    tokens: Tensor = tower.patch_dropout(torch.cat([first, patches + position[1:]], dim=1))
    return tokens


# --- expanded towers ---------------------------------------------------------------------------


class TemporalMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` (open_clip 3) over neighbouring frames.

    Tokens of videos are ``[B, T, N, D]``, with ``batch_first=False`` ``[T, B, N, D]``. Tensors with
    another number of axes are passed to ``nn.MultiheadAttention``.
    """

    view: FrameView

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Compute self-attention of a video, or call ``nn.MultiheadAttention``."""
        if query.ndim != 4:
            output: tuple[Tensor, Tensor | None] = super().forward(query, *args, **kwargs)
            return output
        x = query if self.batch_first else query.transpose(0, 1)
        qkv = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        dropout = self.dropout if self.training else 0.0
        y = temporal_attention(q, k, v, self.view, dropout_p=dropout)
        y = functional.linear(y, self.out_proj.weight, self.out_proj.bias)
        return (y if self.batch_first else y.transpose(0, 1)), None


class TemporalAttention(Attention):  # type: ignore[misc]
    """open_clip's ``Attention`` over neighbouring frames.

    All its options are supported: q/k norm, scaled cosine, head scale and inner norm.
    """

    view: FrameView

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute self-attention of a video ``[B, T, N, D]``, or call ``Attention``."""
        if x.ndim != 4:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        qkv = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        q, k, scale = self._normalised(q, k)
        dropout = self.attn_drop.p if self.training else 0.0
        y = temporal_attention(q, k, v, self.view, dropout_p=dropout, scale=scale)
        if self.head_scale is not None:
            y = (y.unflatten(-1, (self.num_heads, -1)) * self.head_scale.view(-1, 1)).flatten(-2)
        y = self.out_proj(self.ln_inner(y))
        out: Tensor = self.out_drop(y)
        return out

    def _normalised(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, float | None]:
        """Return normalised queries and keys, and the factor of their scores."""
        if self.logit_scale is None:
            return self.ln_q(q), self.ln_k(k), None
        # The learned scale of each head is multiplied into the queries, so the factor is 1.
        scale = self.logit_scale.clamp(max=self.logit_scale_max).exp().view(-1, 1)
        return functional.normalize(q, dim=-1) * scale, functional.normalize(k, dim=-1), 1.0


class TemporalVisionTransformer(TemporalTower, VisionTransformer):  # type: ignore[misc]
    """open_clip's ``VisionTransformer`` for videos ``[B, T, C, H, W]`` and images."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the features ``[B, T, D]`` of a video, or ``[B, D]`` of images ``[B, C, H, W]``.

        With ``output_tokens`` the second result is the patch tokens ``[B, T, N, D]``.

        Raises:
            VideoShapeError: if ``x`` is not an image batch or a video of the tower's frame size.
        """
        if isinstance(x, Tensor) and x.ndim == 4:
            output: Tensor | tuple[Tensor, Tensor] = super().forward(x)
            return output
        _require_video(self, x)
        clips = x.shape[:2]
        tokens = self.ln_pre(_embedded(self, x.flatten(0, 1))).unflatten(0, clips)
        tokens = self.transformer(tokens)
        pooled, rest = self._pool(tokens.flatten(0, 1))
        if self.proj is not None:
            pooled = pooled @ self.proj
        pooled = pooled.unflatten(0, clips)
        return (pooled, rest.unflatten(0, clips)) if self.output_tokens else pooled

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the outputs of chosen layers, as open_clip's ``VisionTransformer`` does.

        The tensors of a video have the axes ``[B, T]`` instead of the batch axis of images. The
        output of a layer is ``[B, T, W, H', W']``, with ``output_fmt="NLC"`` ``[B, T, N, W]``.

        Raises:
            VideoShapeError: if ``x`` is not an image batch or a video of the tower's frame size.
        """
        if isinstance(x, Tensor) and x.ndim == 4:
            output: dict[str, Any] = super().forward_intermediates(x, *args, **kwargs)
            return output
        _require_video(self, x)
        clips = x.shape[:2]
        tower = frame_tower(self, VisionTransformer, "transformer.resblocks", clips)
        frames = tower.forward_intermediates(x.flatten(0, 1), *args, **kwargs)
        return {name: by_clip(value, clips) for name, value in frames.items()}


# --- towers with prompts -----------------------------------------------------------------------


class PromptedVisionTransformer(PromptedTower, VisionTransformer):  # type: ignore[misc]
    """open_clip's ``VisionTransformer`` with prompts, for videos ``[B, T, C, H, W]`` and images."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return the features ``[B, T, D]`` of a video, or ``[B, D]`` of images ``[B, C, H, W]``.

        An image is encoded as a clip of one frame. With ``output_tokens`` the second result is the
        patch tokens ``[B, T, N, D]``.

        Raises:
            VideoShapeError: if ``x`` is not an image batch or a video of the tower's frame size, or
                if the prompts do not support the number of frames.
        """
        video = x.unsqueeze(1) if isinstance(x, Tensor) and x.ndim == 4 else x
        _require_video(self, video)
        clips = video.shape[:2]
        tokens = _embedded(self, video.flatten(0, 1)).unflatten(0, clips)
        layers = range(len(self.transformer.resblocks))
        blocks = [partial(run_block, self.transformer, layer) for layer in layers]
        checkpointing = self.transformer.grad_checkpointing
        tokens = self._through(tokens, self.ln_pre, blocks, checkpointing)
        pooled, rest = self._pool(tokens.flatten(0, 1))
        if self.proj is not None:
            pooled = pooled @ self.proj
        if x.ndim != 4:
            pooled, rest = pooled.unflatten(0, clips), rest.unflatten(0, clips)
        return (pooled, rest) if self.output_tokens else pooled


class PromptedTemporalVisionTransformer(PromptedExpandedTower, PromptedVisionTransformer):
    """An expanded ``VisionTransformer`` with prompts."""


def run_block(transformer: Any, layer: int, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Run one block of an open_clip ``Transformer`` on tokens with the batch axis first."""
    block = transformer.resblocks[layer]
    if getattr(transformer, "batch_first", True):  # open_clip 4 has no other layout
        output: Tensor = block(x, attn_mask=attn_mask)
        return output
    sequence_first: Tensor = block(x.transpose(0, 1), attn_mask=attn_mask)
    return sequence_first.transpose(0, 1)


# --- the family --------------------------------------------------------------------------------


def _require_video(tower: Any, video: Tensor) -> None:
    require_video(video, tower.image_size, tower.conv1.weight)


def _attentions(tower: Any) -> list[nn.Module]:
    attentions = [block.attn for block in tower.transformer.resblocks]
    for index, attention in enumerate(attentions):
        if isinstance(attention, (nn.MultiheadAttention, Attention)):
            _require_packed(index, attention)
    return attentions


def _require_packed(index: int, attention: Any) -> None:
    bias = getattr(attention, "bias_k", None)  # open_clip's Attention has neither option
    zeros = getattr(attention, "add_zero_attn", False)
    if attention.in_proj_weight is None or bias is not None or zeros:
        raise UnsupportedModelError(
            f"Layer {index} of the tower has an attention with separate key and value widths, "
            "bias_k or add_zero_attn; it can't be expanded. No released CLIP uses these options. "
            "Build the tower without them."
        )


def _encoder(model: nn.Module) -> Encoder | None:
    return call if isinstance(model, (VisionTransformer, TimmModel, ModifiedResNet)) else None


def _facts(tower: Any) -> TowerFacts:
    blocks = tower.transformer.resblocks
    return TowerFacts(
        width=tower.transformer.width,
        layers=len(blocks),
        heads=blocks[0].attn.num_heads,
        patch_size=tower.patch_size,
        image_size=tower.image_size,
        feature_size=tower.output_dim,
        prefix=1,
        class_token=True,
        first_weight=tower.class_embedding,
    )


def quick_gelu_tower(**sizes: Any) -> nn.Module:
    """Return a plain ``VisionTransformer`` with QuickGELU.

    Args:
        sizes: arguments of open_clip's ``VisionTransformer``.
    """
    tower: nn.Module = VisionTransformer(act_layer=QuickGELU, **sizes)
    return tower


# Models of open_clip 4. open_clip 3 has none of them.
_NO_FRAMES = {
    "CLAP": "is a model for audio and has no image tower",
    "NaFlexGenLap": "is a model for audio and has no image tower",
    "NaFlexGenLip": "takes patches with coordinates instead of frames",
}

FAMILY = Family(
    towers={VisionTransformer: TemporalVisionTransformer},
    attentions={
        nn.MultiheadAttention: TemporalMultiheadAttention,
        Attention: TemporalAttention,
    },
    prompted={
        VisionTransformer: PromptedVisionTransformer,
        TemporalVisionTransformer: PromptedTemporalVisionTransformer,
    },
    layers=_attentions,
    expected="torch.nn.MultiheadAttention or open_clip's Attention",
    require=_require_video,
    encoder=_encoder,
    facts=_facts,
    refused={
        getattr(open_clip, name): reason
        for name, reason in _NO_FRAMES.items()
        if hasattr(open_clip, name)
    },
)
