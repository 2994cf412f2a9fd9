"""The vision model of Hugging Face's SigLIP 2 NaFlex (transformers 5).

The model takes the patches of images of every shape. For videos and images of one shape, the
functions here cut the frames into patches, so that the model is used as the other models are. The
other models of SigLIP 2 (with a fixed resolution) are a ``SiglipModel`` in transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.siglip2.modeling_siglip2 import (
    Siglip2Attention,
    Siglip2ForImageClassification,
    Siglip2Model,
    Siglip2VisionModel,
)

from openvclip.errors import VideoShapeError
from openvclip.towers.checks import require_video
from openvclip.towers.family import Encoder, Family, pooled
from openvclip.towers.hf import (
    FrameAttention,
    PromptedFrameTower,
    SiglipTower,
    attentions,
    facts,
    register_as,
    video_outputs,
)
from openvclip.towers.prompted import PromptedExpandedTower, PromptedTower


class TemporalSiglip2Attention(FrameAttention, Siglip2Attention):  # type: ignore[misc]
    """``Siglip2Attention`` over neighbouring frames."""


class TemporalSiglip2VisionModel(SiglipTower, Siglip2VisionModel):  # type: ignore[misc]
    """``Siglip2VisionModel`` for videos ``[B, T, C, H, W]`` and patches of images ``[B, N, P]``."""

    def forward(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return ``pooler_output`` ``[B, T, D]`` and ``last_hidden_state`` ``[B, T, N, D]``.

        The outputs for patches of images ``[B, N, P]``, as the processor of transformers returns
        them, have no axis T.

        Raises:
            VideoShapeError: if ``pixel_values`` is neither patches nor a video, or if the sides of
                the frames are no multiples of the size of a patch.
            UsageError: if ``output_attentions`` is given with a video.
        """
        # A tower with prompts takes pixels only: the plain method would leave the prompts out.
        if pixel_values is None or (
            self._are_patches(pixel_values) and not isinstance(self, PromptedTower)
        ):
            return Siglip2VisionModel.forward(self, pixel_values, *args, **kwargs)
        for name in ("pixel_attention_mask", "spatial_shapes"):  # None: the frames have no padding
            kwargs.pop(name, None)
        return video_outputs(self, pixel_values, **kwargs)

    def _are_patches(self, pixel_values: Any) -> bool:
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim != 3:
            return False
        values: int = self.embeddings.patch_embedding.in_features
        return pixel_values.shape[2] == values

    def _embed(self, video: Tensor, any_size: bool) -> Tensor:
        _require_patches(self, video)
        embeddings = self.embeddings
        patches = _patches(video.flatten(0, 1), embeddings.patch_size)
        weight = embeddings.patch_embedding.weight
        tokens: Tensor = embeddings.patch_embedding(patches.to(weight.dtype))
        return tokens + self._positions(
            *(side // embeddings.patch_size for side in video.shape[3:])
        )

    def _positions(self, rows: int, columns: int) -> Tensor:
        """Return the position embeddings of a grid of patches ``[N, D]``."""
        side = self.embeddings.position_embedding_size
        grid: Tensor = self.embeddings.position_embedding.weight
        if (rows, columns) == (side, side):
            return grid
        shape = torch.tensor([[rows, columns]], device=grid.device)
        resized: Tensor = self.embeddings.resize_positional_embeddings(
            grid.unflatten(0, (side, side)), shape, max_length=rows * columns
        )
        return resized[0]


class PromptedSiglip2VisionModel(PromptedFrameTower, TemporalSiglip2VisionModel):
    """``Siglip2VisionModel`` with prompts, for videos ``[B, T, C, H, W]`` and images."""


class PromptedTemporalSiglip2VisionModel(PromptedExpandedTower, PromptedSiglip2VisionModel):
    """An expanded ``Siglip2VisionModel`` with prompts."""


def _patches(images: Tensor, side: int) -> Tensor:
    """Return the patches ``[n, N, side * side * C]`` of images ``[n, C, H, W]``, row by row."""
    # Sizes of cut: n, C, rows, side, columns, side.
    cut = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    patches: Tensor = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return patches


def _require_patches(tower: Any, video: Tensor) -> None:
    require_video(video)
    side = tower.embeddings.patch_size
    if video.shape[3] % side or video.shape[4] % side:
        raise VideoShapeError(
            f"Got frames of {video.shape[3]} x {video.shape[4]} pixels (H x W); expected multiples "
            f"of the size of a patch, {side}. Resize and crop the frames first."
        )


def _encoder(model: nn.Module) -> Encoder | None:
    return _features if isinstance(model, (Siglip2Model, Siglip2VisionModel)) else None


def _features(model: Any, pixels: Tensor) -> Tensor:
    encode = getattr(model, "get_image_features", model)
    prompted = any(isinstance(module, PromptedSiglip2VisionModel) for module in model.modules())
    if pixels.ndim == 5 or prompted:
        inputs: dict[str, Tensor | None] = {
            "pixel_values": pixels,
            "pixel_attention_mask": None,
            "spatial_shapes": None,
        }
    else:
        inputs = _inputs(pixels, getattr(model, "vision_model", model).embeddings.patch_size)
    return pooled(encode(**inputs, return_dict=True))


def _inputs(images: Tensor, side: int) -> dict[str, Tensor | None]:
    """Return the inputs for images of one shape, as the processor of transformers makes them."""
    patches = _patches(images, side)
    shape = torch.tensor([size // side for size in images.shape[2:]], device=images.device)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": patches.new_ones(patches.shape[:2], dtype=torch.int32),
        "spatial_shapes": shape.expand(len(images), 2),
    }


for _changed in (
    TemporalSiglip2VisionModel,
    PromptedSiglip2VisionModel,
    PromptedTemporalSiglip2VisionModel,
):
    register_as(Siglip2VisionModel, _changed)


FAMILY = Family(
    towers={Siglip2VisionModel: TemporalSiglip2VisionModel},
    attentions={Siglip2Attention: TemporalSiglip2Attention},
    prompted={
        Siglip2VisionModel: PromptedSiglip2VisionModel,
        TemporalSiglip2VisionModel: PromptedTemporalSiglip2VisionModel,
    },
    layers=attentions,
    expected="transformers' Siglip2Attention",
    require=_require_patches,
    encoder=_encoder,
    facts=facts,
    pooling=(Siglip2ForImageClassification,),
)
