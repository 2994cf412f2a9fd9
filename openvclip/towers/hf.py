"""The vision models of Hugging Face's CLIP and SigLIP (transformers 5)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import (
    CLIPAttention,
    CLIPForImageClassification,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.models.siglip.modeling_siglip import (
    SiglipAttention,
    SiglipForImageClassification,
    SiglipVisionModel,
)
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, capture_outputs

from openvclip.errors import UsageError
from openvclip.towers.attention import (
    TemporalTower,
    require_video,
    temporal_attention,
)
from openvclip.towers.family import Encoder, Family
from openvclip.towers.view import FrameView


class _FrameAttention:
    """Self-attention that sees the neighbouring frames where it is given frames.

    Frames always go through PyTorch's fused attention, whatever ``config._attn_implementation``
    says: the other implementations compute the same, of one sequence alone.
    """

    view: FrameView

    def forward(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Self-attention of frames ``[B, T, N, D]``; other ranks go to the parent class."""
        if hidden_states.ndim == 4:
            return _attend(self, hidden_states), None
        plain: tuple[Tensor, Tensor | None] = super().forward(  # type: ignore[misc]
            hidden_states, *args, **kwargs
        )
        return plain


class TemporalCLIPAttention(_FrameAttention, CLIPAttention):  # type: ignore[misc]
    """``CLIPAttention`` over neighbouring frames."""


class TemporalSiglipAttention(_FrameAttention, SiglipAttention):  # type: ignore[misc]
    """``SiglipAttention`` over neighbouring frames."""


def _attend(attn: Any, x: Tensor) -> Tensor:
    q, k, v = (
        layer(x).unflatten(-1, (attn.num_heads, attn.head_dim))
        for layer in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    dropout = attn.dropout if attn.training else 0.0
    out: Tensor = attn.out_proj(
        temporal_attention(q, k, v, attn.view, dropout_p=dropout, scale=attn.scale)
    )
    return out


class _FrameTower(TemporalTower):
    """What the vision models have in common; :meth:`_encode` and :meth:`_pool` are the rest."""

    def forward(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Frames' ``pooler_output`` ``[B, T, D]`` and ``last_hidden_state`` ``[B, T, N, D]``.

        Raises:
            VideoShapeError: neither an image batch nor a video of the tower's frame size.
            UsageError: ``output_attentions`` or ``attention_mask`` with a video.
        """
        images = isinstance(pixel_values, Tensor) and pixel_values.ndim == 4
        if images or pixel_values is None:
            return super().forward(pixel_values, *args, **kwargs)  # type: ignore[misc]
        return _video_outputs(self, pixel_values, *args, **kwargs)

    def _encode(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """What the last layer makes of embedded frames ``[B, T, N, D]``."""
        raise NotImplementedError

    def _pool(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Last hidden states ``[B, T, N, D]`` as the model gives them, and pooled ones."""
        raise NotImplementedError


class TemporalCLIPVisionModel(_FrameTower, CLIPVisionModel):  # type: ignore[misc]
    """``CLIPVisionModel`` for videos ``[B, T, C, H, W]`` and images alike."""

    def _encode(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        tokens = self.pre_layrnorm(tokens)
        hidden: Tensor = self.encoder(inputs_embeds=tokens, **kwargs).last_hidden_state
        return hidden

    def _pool(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        return hidden, self.post_layernorm(hidden[:, :, 0])


class TemporalSiglipVisionModel(_FrameTower, SiglipVisionModel):  # type: ignore[misc]
    """``SiglipVisionModel`` for videos ``[B, T, C, H, W]`` and images alike."""

    def _encode(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        hidden: Tensor = self.encoder(inputs_embeds=tokens, **kwargs).last_hidden_state
        return hidden

    def _pool(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden = self.post_layernorm(hidden)
        if not self.use_head:
            return hidden, None
        return hidden, self.head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


@capture_outputs(tie_last_hidden_states=False)  # type: ignore[untyped-decorator]
def _video_outputs(
    tower: Any, video: Tensor, interpolate_pos_encoding: bool | None = False, **kwargs: Any
) -> BaseModelOutputWithPooling:
    if kwargs.get("attention_mask") is not None:
        raise UsageError("attention_mask is for images; a video takes none.")
    if kwargs.get("output_attentions", getattr(tower.config, "output_attentions", False)):
        raise UsageError(
            "output_attentions is for images: the fused attention over a video's frames never "
            "holds its weights. Turn it off for videos."
        )
    _require_video(tower, video, bool(interpolate_pos_encoding))
    tokens = tower.embeddings(
        video.flatten(0, 1), interpolate_pos_encoding=bool(interpolate_pos_encoding)
    )
    hidden = tower._encode(tokens.unflatten(0, video.shape[:2]), **kwargs)
    hidden, pooled = tower._pool(hidden)
    return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


def _require_video(tower: Any, video: Tensor, any_size: bool = False) -> None:
    size = tower.embeddings.image_size
    # Without a weight to compare: the embeddings convert the pixels to the dtype of theirs.
    require_video(video, None if any_size else (size, size))


def take_the_place_of(plain: Any, other: Any) -> None:
    """Let transformers take the class ``other`` for the class of its own that it stands for."""
    # transformers writes a model's class name into the config that it saves, and looks up by the
    # class which outputs (hidden_states, attentions) a model can record.
    other.__name__ = plain.__name__
    _CAN_RECORD_REGISTRY.update({str(other): plain._can_record_outputs})


take_the_place_of(CLIPVisionModel, TemporalCLIPVisionModel)
take_the_place_of(SiglipVisionModel, TemporalSiglipVisionModel)


def _attentions(tower: Any) -> list[nn.Module]:
    return [layer.self_attn for layer in tower.encoder.layers]


def _encoder(model: nn.Module) -> Encoder | None:
    if hasattr(model, "get_image_features"):
        return _image_features
    towers = (CLIPVisionModel, CLIPVisionModelWithProjection, SiglipVisionModel)
    return _vision_features if isinstance(model, towers) else None


def _image_features(model: Any, pixels: Tensor) -> Any:
    return _pooled(model.get_image_features(pixel_values=pixels, return_dict=True))


def _vision_features(model: Any, pixels: Tensor) -> Any:
    return _pooled(model(pixel_values=pixels, return_dict=True))


def _pooled(outputs: Any) -> Any:
    if hasattr(outputs, "image_embeds"):
        return outputs.image_embeds
    return getattr(outputs, "pooler_output", outputs)


FAMILY = Family(
    name="hf",
    towers={
        CLIPVisionModel: TemporalCLIPVisionModel,
        SiglipVisionModel: TemporalSiglipVisionModel,
    },
    attentions={
        CLIPAttention: TemporalCLIPAttention,
        SiglipAttention: TemporalSiglipAttention,
    },
    layers=_attentions,
    expected="transformers' CLIPAttention or SiglipAttention",
    require=_require_video,
    encoder=_encoder,
    pooling=(CLIPForImageClassification, SiglipForImageClassification),
)
