"""open_clip's own ``VisionTransformer`` (OpenAI, LAION, DataComp, MetaCLIP, CoCa, ...)."""

from __future__ import annotations

from typing import Any

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import Attention, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import UnsupportedModelError
from openvclip.towers.attention import (
    TemporalTower,
    require_video,
    temporal_attention,
)
from openvclip.towers.family import Encoder, Family, call
from openvclip.towers.view import FrameView


class TemporalMultiheadAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that attends over neighbouring frames where it is given frames.

    Tokens ``[B, T, N, D]`` (``[T, B, N, D]`` with ``batch_first=False``) are frames of clips;
    anything else goes to the parent class untouched.
    """

    view: FrameView

    def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Self-attention of the frames; see ``nn.MultiheadAttention`` for everything else."""
        if query.ndim != 4:
            plain: tuple[Tensor, Tensor | None] = super().forward(query, *args, **kwargs)
            return plain
        x = query if self.batch_first else query.transpose(0, 1)
        qkv = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        dropout = self.dropout if self.training else 0.0
        y = temporal_attention(q, k, v, self.view, dropout_p=dropout)
        y = functional.linear(y, self.out_proj.weight, self.out_proj.bias)
        return (y if self.batch_first else y.transpose(0, 1)), None


class TemporalAttention(Attention):  # type: ignore[misc]
    """open_clip's ``Attention`` (q/k norm, scaled cosine, head scale, inner norm), likewise."""

    view: FrameView

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Self-attention of frames ``[B, T, N, D]``; other ranks go to the parent class."""
        if x.ndim != 4:
            plain: Tensor = super().forward(x, attn_mask=attn_mask)
            return plain
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
        if self.logit_scale is None:
            return self.ln_q(q), self.ln_k(k), None
        # The scale is learned for each head: it goes into the queries, and SDPA's stays 1.
        factor = self.logit_scale.clamp(max=self.logit_scale_max).exp().view(-1, 1)
        return functional.normalize(q, dim=-1) * factor, functional.normalize(k, dim=-1), 1.0


class TemporalVisionTransformer(TemporalTower, VisionTransformer):  # type: ignore[misc]
    """open_clip's ``VisionTransformer`` for videos ``[B, T, C, H, W]`` and images alike."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Features of each frame ``[B, T, D]`` for a video; plain CLIP for ``[B, C, H, W]``.

        With ``output_tokens`` the patch tokens ``[B, T, N, D]`` come second.

        Raises:
            VideoShapeError: neither an image batch nor a video of the tower's frame size.
        """
        if isinstance(x, Tensor) and x.ndim == 4:
            plain: Tensor | tuple[Tensor, Tensor] = super().forward(x)
            return plain
        _require_video(self, x)
        clips = x.shape[:2]
        tokens = self._embeds(x.flatten(0, 1)).unflatten(0, clips)
        tokens = self.transformer(tokens)
        pooled, rest = self._pool(tokens.flatten(0, 1))
        if self.proj is not None:
            pooled = pooled @ self.proj
        pooled = pooled.unflatten(0, clips)
        return (pooled, rest.unflatten(0, clips)) if self.output_tokens else pooled


def _require_video(tower: Any, video: Tensor) -> None:
    require_video(video, tower.image_size, tower.conv1.weight)


def _attentions(tower: Any) -> list[nn.Module]:
    attentions = [block.attn for block in tower.transformer.resblocks]
    for index, attention in enumerate(attentions):
        if isinstance(attention, nn.MultiheadAttention):
            _require_packed(index, attention)
    return attentions


def _require_packed(index: int, attention: nn.MultiheadAttention) -> None:
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise UnsupportedModelError(
            f"Layer {index} of the tower has an attention with separate key and value widths, "
            "bias_k or add_zero_attn, which no CLIP uses; it can't be expanded."
        )


def _encoder(model: nn.Module) -> Encoder | None:
    return call if isinstance(model, (VisionTransformer, TimmModel, ModifiedResNet)) else None


FAMILY = Family(
    name="open_clip",
    towers={VisionTransformer: TemporalVisionTransformer},
    attentions={
        nn.MultiheadAttention: TemporalMultiheadAttention,
        Attention: TemporalAttention,
    },
    layers=_attentions,
    expected="torch.nn.MultiheadAttention or open_clip's Attention",
    require=_require_video,
    encoder=_encoder,
)
