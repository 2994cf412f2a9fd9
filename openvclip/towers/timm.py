"""timm's ``VisionTransformer`` (SigLIP, ViTamin, MobileCLIP-B) and ``Eva`` (EVA01, EVA02, PE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models import checkpoint, checkpoint_seq
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import UnsupportedModelError, UsageError, VideoShapeError
from openvclip.towers.attention import (
    TemporalTower,
    require_video,
    temporal_attention,
)
from openvclip.towers.family import Encoder, Family, call
from openvclip.towers.view import FrameView

# Other blocks (parallel ones) work on their queries and keys themselves.
_BLOCKS = (Block, ResPostBlock, EvaBlock, EvaBlockPostNorm)


class _FrameAttention:
    """Self-attention that sees the neighbouring frames where it is given frames."""

    view: FrameView

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Self-attention of frames ``[B, T, N, D]``; other ranks go to the parent class."""
        if x.ndim == 4:
            return _attend(self, x, *args, **kwargs)
        plain: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return plain


class TemporalAttention(_FrameAttention, Attention):  # type: ignore[misc]
    """timm's ``Attention`` over neighbouring frames."""


class TemporalEvaAttention(_FrameAttention, EvaAttention):  # type: ignore[misc]
    """timm's ``EvaAttention`` over neighbouring frames."""


class TemporalAttentionRope(_FrameAttention, AttentionRope):  # type: ignore[misc]
    """timm's ``AttentionRope`` over neighbouring frames."""


def _attend(
    attn: Any,
    x: Tensor,
    rope: Tensor | None = None,
    attn_mask: None = None,
    is_causal: bool = False,
) -> Tensor:
    """What the attentions of timm have in common, for tokens ``[B, T, N, D]``.

    The blocks always pass the last two, and the towers refuse them for videos.
    """
    gate = getattr(attn, "gate", None)
    q, k, v = _projected(attn, x)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        q, k = _rotated(attn, q, rope).type_as(v), _rotated(attn, k, rope).type_as(v)
    groups = getattr(attn, "num_kv_groups", 1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=-2), v.repeat_interleave(groups, dim=-2)
    dropout = attn.attn_drop.p if attn.training else 0.0
    y = attn.norm(temporal_attention(q, k, v, attn.view, dropout_p=dropout))
    if gate is not None:
        y = y * gate(x).sigmoid()
    out: Tensor = attn.proj_drop(attn.proj(y))
    return out


def _projected(attn: Any, x: Tensor) -> Sequence[Tensor]:
    """Queries, keys and values ``[B, T, N, heads, d]``."""
    if attn.qkv is None:
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)
        return [layer(x).unflatten(-1, (-1, attn.head_dim)) for layer in layers]
    if getattr(attn, "q_bias", None) is None:
        qkv = attn.qkv(x)
    else:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        if attn.qkv_bias_separate:
            qkv = attn.qkv(x).add_(bias)  # in place: autocast's dtype is that of the projection
        else:
            qkv = functional.linear(x, attn.qkv.weight, bias)
    parts: Sequence[Tensor] = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(-3)
    return parts


def _rotated(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding of the patch tokens of ``[B, T, N, heads, d]``.

    timm's angles are ``[N, 2 d]``, or end in ``[heads or 1, N, 2 d]`` (of the layer, or of each
    frame where patches are dropped).
    """
    angles = rope.unsqueeze(-2) if rope.ndim == 2 else rope.transpose(-2, -3)
    prefix, patches = x[..., : attn.num_prefix_tokens, :, :], x[..., attn.num_prefix_tokens :, :, :]
    half = getattr(attn, "rotate_half", False)
    return torch.cat([prefix, apply_rot_embed_cat(patches, angles, half=half)], dim=-3)


class _FrameTower(TemporalTower):
    """What the towers have in common; :meth:`_through_blocks` is the rest."""

    norm: nn.Module

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tokens of each frame ``[B, T, N, D]`` for a video; plain timm for ``[B, C, H, W]``.

        Raises:
            VideoShapeError: neither an image batch nor a video that fits the tower.
            UsageError: an attention mask with a video.
        """
        if isinstance(x, Tensor) and x.ndim == 4:
            plain: Tensor = super().forward_features(x, *args, **kwargs)  # type: ignore[misc]
            return plain
        _require_video(self, x)
        _require_no_mask(args, kwargs)
        tokens: Tensor = self.norm(self._through_blocks(x))
        return tokens

    def forward_head(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Feature of each frame ``[B, T, D]`` from tokens ``[B, T, N, D]``; images as before."""
        flat = x.flatten(0, 1) if x.ndim == 4 else x
        out: Tensor = super().forward_head(flat, *args, **kwargs)  # type: ignore[misc]
        return out.unflatten(0, x.shape[:2]) if x.ndim == 4 else out

    def _through_blocks(self, video: Tensor) -> Tensor:
        raise NotImplementedError


class TemporalVisionTransformer(_FrameTower, VisionTransformer):  # type: ignore[misc]
    """timm's ``VisionTransformer`` for videos ``[B, T, C, H, W]`` and images alike."""

    def _through_blocks(self, video: Tensor) -> Tensor:
        tokens = self.patch_drop(self._pos_embed(self.patch_embed(video.flatten(0, 1))))
        tokens = self.norm_pre(tokens).unflatten(0, video.shape[:2])
        if self.grad_checkpointing:
            tokens = checkpoint_seq(self.blocks, tokens)
        else:
            tokens = self.blocks(tokens)
        return tokens  # type: ignore[no-any-return]


class TemporalEva(_FrameTower, Eva):  # type: ignore[misc]
    """timm's ``Eva`` for videos ``[B, T, C, H, W]`` and images alike."""

    def _through_blocks(self, video: Tensor) -> Tensor:
        clips = video.shape[:2]
        tokens, rope = self._pos_embed(self.patch_embed(video.flatten(0, 1)))
        tokens = self.norm_pre(tokens).unflatten(0, clips)
        for block, angles in zip(self.blocks, rope_by_layer(self, rope, clips), strict=True):
            if self.grad_checkpointing:
                tokens = checkpoint(block, tokens, rope=angles)
            else:
                tokens = block(tokens, rope=angles)
        return tokens  # type: ignore[no-any-return]


def rope_by_layer(tower: Any, rope: Tensor | None, clips: torch.Size) -> list[Tensor | None]:
    """The rotary angles of each layer; where each frame has its own, ``[B, T, ...]``."""
    if rope is None:
        return [None] * len(tower.blocks)
    mixed = getattr(tower, "rope_mixed", False)
    layers = list(rope.unbind(0)) if mixed else [rope] * len(tower.blocks)
    return [angles.unflatten(0, clips) if angles.ndim == 4 else angles for angles in layers]


def _require_video(tower: Any, video: Tensor) -> None:
    embed = tower.patch_embed
    weight = next(embed.parameters())
    require_video(video, None if tower.dynamic_img_size else embed.img_size, weight)
    if tower.dynamic_img_size and not embed.dynamic_img_pad:
        height, width = embed.feat_ratio(as_scalar=False)
        if video.shape[-2] % height or video.shape[-1] % width:
            raise VideoShapeError(
                f"Got frames of {video.shape[-2]} x {video.shape[-1]} pixels (H x W); the model "
                f"takes multiples of {height} x {width}. Resize and crop the frames first."
            )


def _require_no_mask(args: Any, kwargs: dict[str, Any]) -> None:
    """Raise unless a video comes without ``attn_mask`` and ``is_causal``."""
    if any(option is not None and option is not False for option in (*args, *kwargs.values())):
        raise UsageError(
            "attn_mask and is_causal are for images; a video takes neither, nor does a tower with "
            "prompts."
        )


def _attentions(tower: Any) -> list[nn.Module]:
    blocks = list(tower.blocks)
    other = [block for block in blocks if type(block) not in _BLOCKS]
    if other:
        raise UnsupportedModelError(
            f"The tower is made of {type(other[0]).__name__} blocks, which can't be expanded; "
            "expected " + ", ".join(block.__name__ for block in _BLOCKS) + "."
        )
    return [block.attn for block in blocks]


def _encoder(model: nn.Module) -> Encoder | None:
    return call if isinstance(model, (VisionTransformer, Eva)) else None


FAMILY = Family(
    name="timm",
    towers={VisionTransformer: TemporalVisionTransformer, Eva: TemporalEva},
    attentions={
        Attention: TemporalAttention,
        EvaAttention: TemporalEvaAttention,
        AttentionRope: TemporalAttentionRope,
    },
    layers=_attentions,
    expected="timm's Attention, EvaAttention or AttentionRope",
    require=_require_video,
    encoder=_encoder,
)
