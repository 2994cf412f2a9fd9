"""timm's ``VisionTransformer`` (SigLIP, ViTamin, MobileCLIP-B) and ``Eva`` (EVA01, EVA02, PE)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models import checkpoint, checkpoint_seq
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import UnsupportedModelError, UsageError, VideoShapeError
from openvclip.towers.attention import temporal_attention
from openvclip.towers.checks import require_video
from openvclip.towers.family import Encoder, Family, TemporalTower, TowerFacts, call
from openvclip.towers.intermediates import by_clip, frame_tower
from openvclip.towers.prompted import PromptedExpandedTower, PromptedTower
from openvclip.towers.view import FrameView

# The supported blocks. Their attention is one module, `attn`. Other blocks of timm, such as the
# parallel blocks, compute attention in another way.
_BLOCKS = (Block, ResPostBlock, EvaBlock, EvaBlockPostNorm)

# --- expanded towers ---------------------------------------------------------------------------


class _FrameAttention:
    """Self-attention over neighbouring frames for tokens ``[B, T, N, D]``."""

    view: FrameView

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute self-attention of a video ``[B, T, N, D]``, or call the plain attention."""
        if x.ndim == 4:
            return _attend(self, x, *args, **kwargs)
        output: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return output


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
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Compute self-attention of tokens ``[B, T, N, D]`` with any attention of timm.

    Raises:
        UsageError: if ``attn_mask`` or ``is_causal`` is given.
    """
    _require_no_mask((attn_mask, is_causal), {})
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
    """Return queries, keys and values ``[B, T, N, heads, d]``."""
    if attn.qkv is None:
        layers = (attn.q_proj, attn.k_proj, attn.v_proj)
        return [layer(x).unflatten(-1, (-1, attn.head_dim)) for layer in layers]
    if getattr(attn, "q_bias", None) is None:
        qkv = attn.qkv(x)
    else:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        if attn.qkv_bias_separate:
            qkv = attn.qkv(x).add_(bias)  # in place, to keep the dtype of the projection (autocast)
        else:
            qkv = functional.linear(x, attn.qkv.weight, bias)
    parts: Sequence[Tensor] = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(-3)
    return parts


def _rotated(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    """Apply the rotary embedding to the patch tokens of ``[B, T, N, heads, d]``.

    timm's angles have the shape ``[N, 2 d]`` or ``[..., heads or 1, N, 2 d]``. The second
    shape occurs in two cases: each layer has its own angles, or each frame has its own angles,
    because patches are dropped.
    """
    angles = rope.unsqueeze(-2) if rope.ndim == 2 else rope.transpose(-2, -3)
    prefix, patches = x[..., : attn.num_prefix_tokens, :, :], x[..., attn.num_prefix_tokens :, :, :]
    half = getattr(attn, "rotate_half", False)
    return torch.cat([prefix, apply_rot_embed_cat(patches, angles, half=half)], dim=-3)


class _FrameTower(TemporalTower):
    """Base of the expanded towers."""

    norm: nn.Module
    _plain: type[nn.Module]
    """Class of the tower before the expansion."""
    _through_blocks: Callable[[Tensor], Tensor]
    """Method of the subclass. It returns the output of the last block for a video."""

    def _require_video(self, video: Tensor) -> None:
        _require_video(self, video)

    def _require_no_mask(self, args: Any, kwargs: dict[str, Any]) -> None:
        _require_no_mask(args, kwargs)

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the tokens ``[B, T, N, D]`` of a video, or ``[B, N, D]`` of images.

        Raises:
            VideoShapeError: if ``x`` is not an image batch or a video that the tower supports.
            UsageError: if an attention mask is given with a video.
        """
        if isinstance(x, Tensor) and x.ndim == 4:
            output: Tensor = super().forward_features(x, *args, **kwargs)  # type: ignore[misc]
            return output
        self._require_video(x)
        self._require_no_mask(args, kwargs)
        tokens: Tensor = self.norm(self._through_blocks(x))
        return tokens

    def forward_head(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the features ``[B, T, D]`` of a video from its tokens ``[B, T, N, D]``.

        For tokens ``[B, N, D]`` of images, the features are ``[B, D]``.
        """
        flat = x.flatten(0, 1) if x.ndim == 4 else x
        out: Tensor = super().forward_head(flat, *args, **kwargs)  # type: ignore[misc]
        return out.unflatten(0, x.shape[:2]) if x.ndim == 4 else out

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the outputs of chosen layers, as timm's tower does.

        The tensors of a video have the axes ``[B, T]`` instead of the batch axis of images. The
        output of a layer is ``[B, T, D, H', W']``, with ``output_fmt="NLC"`` ``[B, T, N, D]``.
        ``get_intermediate_layers`` calls this method.

        Raises:
            VideoShapeError: if ``x`` is not an image batch or a video that the tower supports.
            UsageError: if an attention mask is given with a video.
        """
        if isinstance(x, Tensor) and x.ndim == 4:
            return super().forward_intermediates(x, *args, **kwargs)  # type: ignore[misc]
        self._require_video(x)
        clips = x.shape[:2]
        tower = frame_tower(self, self._plain, "blocks", clips)
        return by_clip(tower.forward_intermediates(x.flatten(0, 1), *args, **kwargs), clips)


class TemporalVisionTransformer(_FrameTower, VisionTransformer):  # type: ignore[misc]
    """timm's ``VisionTransformer`` for videos ``[B, T, C, H, W]`` and images."""

    _plain = VisionTransformer

    def _through_blocks(self, video: Tensor) -> Tensor:
        tokens = self.patch_drop(self._pos_embed(self.patch_embed(video.flatten(0, 1))))
        tokens = self.norm_pre(tokens).unflatten(0, video.shape[:2])
        if self.grad_checkpointing:
            tokens = checkpoint_seq(self.blocks, tokens)
        else:
            tokens = self.blocks(tokens)
        return tokens  # type: ignore[no-any-return]


class TemporalEva(_FrameTower, Eva):  # type: ignore[misc]
    """timm's ``Eva`` for videos ``[B, T, C, H, W]`` and images."""

    _plain = Eva

    def _through_blocks(self, video: Tensor) -> Tensor:
        clips = video.shape[:2]
        tokens, rope = self._pos_embed(self.patch_embed(video.flatten(0, 1)))
        tokens = self.norm_pre(tokens).unflatten(0, clips)
        for block, angles in zip(self.blocks, _rope_by_layer(self, rope, clips), strict=True):
            if self.grad_checkpointing:
                tokens = checkpoint(block, tokens, rope=angles)
            else:
                tokens = block(tokens, rope=angles)
        return tokens  # type: ignore[no-any-return]


def _rope_by_layer(tower: Any, rope: Tensor | None, clips: torch.Size) -> list[Tensor | None]:
    """Return the rotary angles of each layer.

    If the angles differ between frames, the angles of a layer are ``[B, T, ...]``.
    """
    if rope is None:
        return [None] * len(tower.blocks)
    mixed = getattr(tower, "rope_mixed", False)
    layers = list(rope.unbind(0)) if mixed else [rope] * len(tower.blocks)
    return [angles.unflatten(0, clips) if angles.ndim == 4 else angles for angles in layers]


# --- towers with prompts -----------------------------------------------------------------------


class _PromptedFrameTower(PromptedTower):
    """Base of the towers with prompts."""

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return class and patch tokens: ``[B, T, N, D]`` of a video, ``[B, N, D]`` of images.

        Raises:
            VideoShapeError: if ``x`` is not an image batch or a video that the tower supports, or
                if the prompts do not support the number of frames.
            UsageError: if an attention mask is given.
        """
        video = x.unsqueeze(1) if isinstance(x, Tensor) and x.ndim == 4 else x
        tokens: Tensor = super().forward_features(video, *args, **kwargs)  # type: ignore[misc]
        return tokens.squeeze(1) if x.ndim == 4 else tokens


class PromptedVisionTransformer(_PromptedFrameTower, TemporalVisionTransformer):
    """timm's ``VisionTransformer`` with prompts, for videos ``[B, T, C, H, W]`` and images."""

    def _through_blocks(self, video: Tensor) -> Tensor:
        tokens = self.patch_drop(self._pos_embed(self.patch_embed(video.flatten(0, 1))))
        tokens = tokens.unflatten(0, video.shape[:2])
        return self._through(tokens, self.norm_pre, list(self.blocks), self.grad_checkpointing)


class PromptedTemporalVisionTransformer(PromptedExpandedTower, PromptedVisionTransformer):
    """An expanded ``VisionTransformer`` with prompts."""


class PromptedEva(_PromptedFrameTower, TemporalEva):
    """timm's ``Eva`` with prompts, for videos ``[B, T, C, H, W]`` and images."""

    def _through_blocks(self, video: Tensor) -> Tensor:
        clips = video.shape[:2]
        tokens, rope = self._pos_embed(self.patch_embed(video.flatten(0, 1)))
        blocks = [
            partial(_run_eva_block, block, angles, self.num_prefix_tokens)
            for block, angles in zip(self.blocks, _rope_by_layer(self, rope, clips), strict=True)
        ]
        tokens = tokens.unflatten(0, clips)
        return self._through(tokens, self.norm_pre, blocks, self.grad_checkpointing)


class PromptedTemporalEva(PromptedExpandedTower, PromptedEva):
    """An expanded ``Eva`` with prompts."""


def _run_eva_block(block: nn.Module, angles: Tensor | None, prefix: int, x: Tensor) -> Tensor:
    """Run a block that rotates the patch tokens, but not the prompts after them."""
    if angles is not None:
        if angles.ndim == 5 and x.ndim == 3:  # angles [B, T, ...], but x [B * T, N, W]
            angles = angles.flatten(0, 1)
        angles = _with_zero_angles(angles, x.shape[-2] - prefix)
    out: Tensor = block(x, rope=angles)
    return out


def _with_zero_angles(angles: Tensor, n_tokens: int) -> Tensor:
    """Extend angles ``[..., N, 2 d]`` (sines, then cosines) to ``n_tokens`` with zero angles.

    Prompts stand after the patch tokens and have no position in the image. With zero angles their
    queries and keys are not changed.
    """
    padding = (0, 0, 0, n_tokens - angles.shape[-2])
    sines, cosines = angles.chunk(2, dim=-1)
    return torch.cat(
        [functional.pad(sines, padding), functional.pad(cosines, padding, value=1.0)], dim=-1
    )


# --- the family --------------------------------------------------------------------------------


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
    """Raise :class:`UsageError` if ``attn_mask`` or ``is_causal`` is given."""
    if any(option is not None and option is not False for option in (*args, *kwargs.values())):
        raise UsageError(
            "attn_mask and is_causal are for images only. They are supported neither for videos "
            "nor for towers with prompts. Leave them out."
        )


def _attentions(tower: Any) -> list[nn.Module]:
    blocks = list(tower.blocks)
    unknown = [block for block in blocks if _own_class(block) not in _BLOCKS]
    if unknown:
        raise UnsupportedModelError(
            f"The tower is made of {type(unknown[0]).__name__} blocks, which can't be expanded; "
            "expected " + ", ".join(block.__name__ for block in _BLOCKS) + "."
        )
    return [block.attn for block in blocks]


def _own_class(block: nn.Module) -> type:
    """Return the class of a block, without the change of ``fully_shard``."""
    kinds = type(block).__mro__
    return next(kind for kind in kinds if not kind.__module__.startswith("torch.distributed."))


def _encoder(model: nn.Module) -> Encoder | None:
    return call if isinstance(model, (VisionTransformer, Eva)) else None


def _facts(tower: Any) -> TowerFacts:
    embed, class_token = tower.patch_embed, tower.cls_token
    return TowerFacts(
        width=tower.embed_dim,
        layers=len(tower.blocks),
        heads=tower.blocks[0].attn.num_heads,
        patch_size=embed.feat_ratio(as_scalar=False),
        image_size=embed.img_size,
        feature_size=tower.num_classes or None,
        prefix=tower.num_prefix_tokens,
        class_token=class_token is not None,
        first_weight=next(embed.parameters()) if class_token is None else class_token,
    )


FAMILY = Family(
    towers={VisionTransformer: TemporalVisionTransformer, Eva: TemporalEva},
    attentions={
        Attention: TemporalAttention,
        EvaAttention: TemporalEvaAttention,
        AttentionRope: TemporalAttentionRope,
    },
    prompted={
        VisionTransformer: PromptedVisionTransformer,
        TemporalVisionTransformer: PromptedTemporalVisionTransformer,
        Eva: PromptedEva,
        TemporalEva: PromptedTemporalEva,
    },
    layers=_attentions,
    expected="timm's Attention, EvaAttention or AttentionRope",
    require=_require_video,
    encoder=_encoder,
    facts=_facts,
)
