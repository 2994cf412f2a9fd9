"""The vision models of transformers with the parts of CLIP: MetaCLIP 2, AltCLIP and others."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.altclip.modeling_altclip import AltCLIPAttention, AltCLIPVisionModel
from transformers.models.chinese_clip.modeling_chinese_clip import (
    ChineseCLIPVisionAttention,
    ChineseCLIPVisionModel,
)
from transformers.models.clipseg.modeling_clipseg import (
    CLIPSegAttention,
    CLIPSegForImageSegmentation,
    CLIPSegVisionModel,
)
from transformers.models.metaclip_2.modeling_metaclip_2 import (
    MetaClip2Attention,
    MetaClip2ForImageClassification,
    MetaClip2VisionModel,
    MetaClip2VisionModelWithProjection,
)

from openvclip.towers.family import Encoder, Family
from openvclip.towers.hf import (
    CLIPTower,
    FrameAttention,
    PromptedFrameTower,
    attentions,
    facts,
    register_as,
    require_frames,
    vision_features,
)
from openvclip.towers.prompted import PromptedExpandedTower


class TemporalMetaClip2Attention(FrameAttention, MetaClip2Attention):  # type: ignore[misc]
    """``MetaClip2Attention`` over neighbouring frames."""


class TemporalMetaClip2VisionModel(CLIPTower, MetaClip2VisionModel):  # type: ignore[misc]
    """``MetaClip2VisionModel`` for videos ``[B, T, C, H, W]`` and images."""


class PromptedMetaClip2VisionModel(PromptedFrameTower, TemporalMetaClip2VisionModel):
    """``MetaClip2VisionModel`` with prompts, for videos ``[B, T, C, H, W]`` and images."""


class PromptedTemporalMetaClip2VisionModel(PromptedExpandedTower, PromptedMetaClip2VisionModel):
    """An expanded ``MetaClip2VisionModel`` with prompts."""


class TemporalAltCLIPAttention(FrameAttention, AltCLIPAttention):  # type: ignore[misc]
    """``AltCLIPAttention`` over neighbouring frames."""


class TemporalAltCLIPVisionModel(CLIPTower, AltCLIPVisionModel):  # type: ignore[misc]
    """``AltCLIPVisionModel`` for videos ``[B, T, C, H, W]`` and images."""


class PromptedAltCLIPVisionModel(PromptedFrameTower, TemporalAltCLIPVisionModel):
    """``AltCLIPVisionModel`` with prompts, for videos ``[B, T, C, H, W]`` and images."""


class PromptedTemporalAltCLIPVisionModel(PromptedExpandedTower, PromptedAltCLIPVisionModel):
    """An expanded ``AltCLIPVisionModel`` with prompts."""


class TemporalChineseCLIPVisionAttention(FrameAttention, ChineseCLIPVisionAttention):  # type: ignore[misc]
    """``ChineseCLIPVisionAttention`` over neighbouring frames."""


class TemporalChineseCLIPVisionModel(CLIPTower, ChineseCLIPVisionModel):  # type: ignore[misc]
    """``ChineseCLIPVisionModel`` for videos ``[B, T, C, H, W]`` and images."""


class PromptedChineseCLIPVisionModel(PromptedFrameTower, TemporalChineseCLIPVisionModel):
    """``ChineseCLIPVisionModel`` with prompts, for videos ``[B, T, C, H, W]`` and images."""


class PromptedTemporalChineseCLIPVisionModel(PromptedExpandedTower, PromptedChineseCLIPVisionModel):
    """An expanded ``ChineseCLIPVisionModel`` with prompts."""


class TemporalCLIPSegAttention(FrameAttention, CLIPSegAttention):  # type: ignore[misc]
    """``CLIPSegAttention`` over neighbouring frames."""


class TemporalCLIPSegVisionModel(CLIPTower, CLIPSegVisionModel):  # type: ignore[misc]
    """``CLIPSegVisionModel`` for videos ``[B, T, C, H, W]`` and images."""

    _interpolates = True


class PromptedCLIPSegVisionModel(PromptedFrameTower, TemporalCLIPSegVisionModel):
    """``CLIPSegVisionModel`` with prompts, for videos ``[B, T, C, H, W]`` and images."""


class PromptedTemporalCLIPSegVisionModel(PromptedExpandedTower, PromptedCLIPSegVisionModel):
    """An expanded ``CLIPSegVisionModel`` with prompts."""


_TOWERS: dict[type[nn.Module], type[nn.Module]] = {
    MetaClip2VisionModel: TemporalMetaClip2VisionModel,
    AltCLIPVisionModel: TemporalAltCLIPVisionModel,
    ChineseCLIPVisionModel: TemporalChineseCLIPVisionModel,
    CLIPSegVisionModel: TemporalCLIPSegVisionModel,
}
_PROMPTED: dict[type[nn.Module], type[nn.Module]] = {
    MetaClip2VisionModel: PromptedMetaClip2VisionModel,
    TemporalMetaClip2VisionModel: PromptedTemporalMetaClip2VisionModel,
    AltCLIPVisionModel: PromptedAltCLIPVisionModel,
    TemporalAltCLIPVisionModel: PromptedTemporalAltCLIPVisionModel,
    ChineseCLIPVisionModel: PromptedChineseCLIPVisionModel,
    TemporalChineseCLIPVisionModel: PromptedTemporalChineseCLIPVisionModel,
    CLIPSegVisionModel: PromptedCLIPSegVisionModel,
    TemporalCLIPSegVisionModel: PromptedTemporalCLIPSegVisionModel,
}
for _plain, _expanded in _TOWERS.items():
    for _changed in (_expanded, _PROMPTED[_plain], _PROMPTED[_expanded]):
        register_as(_plain, _changed)


def _require(tower: Any, video: Tensor) -> None:
    # CLIPSeg resizes its positions to every size of the frames.
    require_frames(tower, video, any_size=isinstance(tower, CLIPSegVisionModel))


def _encoder(model: nn.Module) -> Encoder | None:
    towers = (*_TOWERS, MetaClip2VisionModelWithProjection)
    return vision_features if isinstance(model, towers) else None


FAMILY = Family(
    towers=_TOWERS,
    attentions={
        MetaClip2Attention: TemporalMetaClip2Attention,
        AltCLIPAttention: TemporalAltCLIPAttention,
        ChineseCLIPVisionAttention: TemporalChineseCLIPVisionAttention,
        CLIPSegAttention: TemporalCLIPSegAttention,
    },
    prompted=_PROMPTED,
    layers=attentions,
    expected="transformers' MetaClip2Attention, AltCLIPAttention, ChineseCLIPVisionAttention or "
    "CLIPSegAttention",
    require=_require,
    encoder=_encoder,
    facts=facts,
    pooling=(MetaClip2ForImageClassification,),
    refused={CLIPSegForImageSegmentation: "returns masks of images"},
)
