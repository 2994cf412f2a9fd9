"""The vision models of Hugging Face's CLIP and SigLIP (transformers 5).

The classes for other models of transformers, in the files beside this one, derive from the classes
here.
"""

from __future__ import annotations

from functools import partial
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
from openvclip.towers.attention import temporal_attention
from openvclip.towers.checks import require_video
from openvclip.towers.family import Encoder, Family, TemporalTower, TowerFacts, pooled
from openvclip.towers.prompted import PromptedExpandedTower, PromptedTower
from openvclip.towers.view import FrameView

# --- expanded towers ---------------------------------------------------------------------------


class FrameAttention:
    """Self-attention over neighbouring frames for tokens ``[B, T, N, D]``.

    Videos always use PyTorch's ``scaled_dot_product_attention``, whatever the value of
    ``config._attn_implementation`` is. The other implementations compute the same function, but
    support only tokens ``[n, N, D]``, without an axis of frames.
    """

    view: FrameView

    def forward(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute self-attention of a video ``[B, T, N, D]``, or call the plain attention."""
        if hidden_states.ndim == 4:
            return _attend(self, hidden_states), None
        output: tuple[Tensor, Tensor | None] = super().forward(  # type: ignore[misc]
            hidden_states, *args, **kwargs
        )
        return output


class TemporalCLIPAttention(FrameAttention, CLIPAttention):  # type: ignore[misc]
    """``CLIPAttention`` over neighbouring frames."""


class TemporalSiglipAttention(FrameAttention, SiglipAttention):  # type: ignore[misc]
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


class FrameTower(TemporalTower):
    """Base of the expanded vision models.

    A subclass has the methods ``_encode(tokens, **kwargs)``, which returns the output of the last
    layer for embedded tokens ``[B, T, N, D]``, and ``_pool(hidden)``, which returns the last hidden
    states of the model ``[B, T, N, D]`` and the pooled features.
    """

    _interpolates = False
    """The default of ``interpolate_pos_encoding``."""

    def _embed(self, video: Tensor, any_size: bool) -> Tensor:
        """Return the embedded tokens ``[B * T, N, D]`` of the frames of a video."""
        require_frames(self, video, any_size)
        embeddings = self.embeddings  # type: ignore[attr-defined]
        tokens: Tensor = embeddings(video.flatten(0, 1), interpolate_pos_encoding=any_size)
        return tokens

    def forward(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return ``pooler_output`` ``[B, T, D]`` and ``last_hidden_state`` ``[B, T, N, D]``.

        The outputs for images ``[B, C, H, W]`` have no axis T.

        Raises:
            VideoShapeError: if ``pixel_values`` is not an image batch or a video of the tower's
                frame size.
            UsageError: if ``output_attentions`` or ``attention_mask`` is given with a video.
        """
        images = isinstance(pixel_values, Tensor) and pixel_values.ndim == 4
        if images or pixel_values is None:
            return super().forward(pixel_values, *args, **kwargs)  # type: ignore[misc]
        return video_outputs(self, pixel_values, *args, **kwargs)


class CLIPTower(FrameTower):
    """Base of the expanded vision models with the parts of ``CLIPVisionModel``."""

    def _encode(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        tokens = self.pre_layrnorm(tokens)  # type: ignore[attr-defined]
        encoder = self.encoder  # type: ignore[attr-defined]
        hidden: Tensor = encoder(inputs_embeds=tokens, **kwargs).last_hidden_state
        return hidden

    def _pool(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        norm = self.post_layernorm  # type: ignore[attr-defined]
        return hidden, norm(hidden[:, :, 0])


class TemporalCLIPVisionModel(CLIPTower, CLIPVisionModel):  # type: ignore[misc]
    """``CLIPVisionModel`` for videos ``[B, T, C, H, W]`` and images."""


class SiglipTower(FrameTower):
    """Base of the vision models of SigLIP and SigLIP 2."""

    encoder: Any
    post_layernorm: nn.Module
    use_head: bool
    head: nn.Module

    def _encode(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        hidden: Tensor = self.encoder(inputs_embeds=tokens, **kwargs).last_hidden_state
        return hidden

    def _pool(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden = self.post_layernorm(hidden)
        if not self.use_head:
            return hidden, None
        return hidden, self.head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


class TemporalSiglipVisionModel(SiglipTower, SiglipVisionModel):  # type: ignore[misc]
    """``SiglipVisionModel`` for videos ``[B, T, C, H, W]`` and images."""


@capture_outputs(tie_last_hidden_states=False)  # type: ignore[untyped-decorator]
def video_outputs(
    tower: Any, video: Tensor, interpolate_pos_encoding: bool | None = None, **kwargs: Any
) -> BaseModelOutputWithPooling:
    """Return the outputs of an expanded vision model for a video ``[B, T, C, H, W]``."""
    if kwargs.get("attention_mask") is not None:
        raise UsageError("attention_mask is for images only. Leave it out for videos.")
    if kwargs.get("output_attentions", getattr(tower.config, "output_attentions", False)):
        raise UsageError(
            "output_attentions is for images only. Attention over the frames of a video never "
            "computes the matrix of attention weights. Set output_attentions=False for videos."
        )
    if interpolate_pos_encoding is None:
        interpolate_pos_encoding = tower._interpolates
    tokens = tower._embed(video, bool(interpolate_pos_encoding))
    hidden = tower._encode(tokens.unflatten(0, video.shape[:2]), **kwargs)
    hidden, pooled = tower._pool(hidden)
    return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)


# --- towers with prompts -----------------------------------------------------------------------


class PromptedFrameTower(PromptedTower):
    """Base of the vision models with prompts."""

    def forward(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return ``pooler_output`` ``[B, T, D]`` and ``last_hidden_state`` ``[B, T, N, D]``.

        Images ``[B, C, H, W]`` are encoded as clips of one frame. Their outputs have no axis T.

        Raises:
            VideoShapeError: if ``pixel_values`` is not an image batch or a video of the tower's
                frame size, or if the prompts do not support the number of frames.
            UsageError: if ``output_hidden_states``, ``output_attentions`` or ``attention_mask`` is
                given.
        """
        default = getattr(self.config, "output_hidden_states", False)  # type: ignore[attr-defined]
        if kwargs.get("output_hidden_states", default):
            raise UsageError(
                "output_hidden_states does not support prompts. Turn it off, or detach the prompts "
                "first: openvclip.prompting.detach(model)."
            )
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 4:
            return super().forward(pixel_values, *args, **kwargs)  # type: ignore[misc]
        outputs = super().forward(pixel_values.unsqueeze(1), *args, **kwargs)  # type: ignore[misc]
        if isinstance(outputs, tuple):
            return tuple(output.squeeze(1) for output in outputs)
        return BaseModelOutputWithPooling(**{n: x.squeeze(1) for n, x in outputs.items()})

    def _encode(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        layers = self.encoder.layers  # type: ignore[attr-defined]
        # Layers of transformers do activation checkpointing themselves.
        blocks = [partial(layer, attention_mask=None, **kwargs) for layer in layers]
        return self._through(tokens, getattr(self, "pre_layrnorm", nn.Identity()), blocks)


class PromptedCLIPVisionModel(PromptedFrameTower, TemporalCLIPVisionModel):
    """``CLIPVisionModel`` with prompts, for videos ``[B, T, C, H, W]`` and images."""


class PromptedTemporalCLIPVisionModel(PromptedExpandedTower, PromptedCLIPVisionModel):
    """An expanded ``CLIPVisionModel`` with prompts."""


class PromptedSiglipVisionModel(PromptedFrameTower, TemporalSiglipVisionModel):
    """``SiglipVisionModel`` with prompts, for videos ``[B, T, C, H, W]`` and images."""


class PromptedTemporalSiglipVisionModel(PromptedExpandedTower, PromptedSiglipVisionModel):
    """An expanded ``SiglipVisionModel`` with prompts."""


# --- the family --------------------------------------------------------------------------------


def require_frames(tower: Any, video: Tensor, any_size: bool = False) -> None:
    """Raise :class:`VideoShapeError` unless a vision model can encode the frames of a video."""
    size = tower.embeddings.image_size
    # The dtype is not checked, because the embeddings convert the frames to their dtype.
    require_video(video, None if any_size else (size, size))


def attentions(tower: Any) -> list[nn.Module]:
    """Return the attention modules of a vision model in order."""
    return [layer.self_attn for layer in tower.encoder.layers]


def _encoder(model: nn.Module) -> Encoder | None:
    towers = (CLIPVisionModel, CLIPVisionModelWithProjection, SiglipVisionModel)
    return vision_features if isinstance(model, towers) else None


def vision_features(model: Any, pixels: Tensor) -> Tensor:
    """Return the features of a vision model of transformers alone. An :data:`Encoder`."""
    return pooled(model(pixel_values=pixels, return_dict=True))


def facts(tower: Any) -> TowerFacts:
    """Return the sizes of a vision model of transformers."""
    embeddings, layers = tower.embeddings, tower.encoder.layers
    class_token = getattr(embeddings, "class_embedding", None)
    return TowerFacts(
        width=embeddings.embed_dim,
        layers=len(layers),
        heads=layers[0].self_attn.num_heads,
        patch_size=(embeddings.patch_size,) * 2,
        image_size=_pair(getattr(embeddings, "image_size", None)),
        feature_size=None,
        prefix=0 if class_token is None else 1,
        class_token=class_token is not None,
        first_weight=embeddings.patch_embedding.weight if class_token is None else class_token,
    )


def _pair(size: int | None) -> tuple[int, int] | None:
    return None if size is None else (size, size)


def register_as(plain: Any, changed: Any) -> None:
    """Make transformers treat the class ``changed`` like the class ``plain`` of transformers.

    transformers writes the name of a model's class into the saved config. It also looks up by class
    which outputs (hidden_states, attentions) a model can record.
    """
    changed.__name__ = plain.__name__
    _CAN_RECORD_REGISTRY.update({str(changed): plain._can_record_outputs})


for _plain, _changed in (
    (CLIPVisionModel, TemporalCLIPVisionModel),
    (CLIPVisionModel, PromptedCLIPVisionModel),
    (CLIPVisionModel, PromptedTemporalCLIPVisionModel),
    (SiglipVisionModel, TemporalSiglipVisionModel),
    (SiglipVisionModel, PromptedSiglipVisionModel),
    (SiglipVisionModel, PromptedTemporalSiglipVisionModel),
):
    register_as(_plain, _changed)


FAMILY = Family(
    towers={
        CLIPVisionModel: TemporalCLIPVisionModel,
        SiglipVisionModel: TemporalSiglipVisionModel,
    },
    attentions={
        CLIPAttention: TemporalCLIPAttention,
        SiglipAttention: TemporalSiglipAttention,
    },
    prompted={
        CLIPVisionModel: PromptedCLIPVisionModel,
        TemporalCLIPVisionModel: PromptedTemporalCLIPVisionModel,
        SiglipVisionModel: PromptedSiglipVisionModel,
        TemporalSiglipVisionModel: PromptedTemporalSiglipVisionModel,
    },
    layers=attentions,
    expected="transformers' CLIPAttention or SiglipAttention",
    require=require_frames,
    encoder=_encoder,
    facts=facts,
    pooling=(CLIPForImageClassification, SiglipForImageClassification),
)
