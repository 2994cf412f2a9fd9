"""timm's ``VisionTransformer`` and ``Eva`` with prompts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from openvclip.towers import timm as adapter
from openvclip.towers.prompted import NeighboursSeen, PromptedTower, TowerFacts


class _Prompted(PromptedTower):
    """What the towers have in common."""

    @staticmethod
    def facts(tower: Any) -> TowerFacts:
        """What there is to know of the tower."""
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

    def forward_features(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Class and patch tokens of each frame ``[B, T, N, D]``; of images ``[B, N, D]``.

        Raises:
            VideoShapeError: neither an image batch nor a video that fits the tower, or a clip
                length that the prompts were not made for.
            UsageError: an attention mask.
        """
        video = x.unsqueeze(1) if isinstance(x, Tensor) and x.ndim == 4 else x
        tokens: Tensor = super().forward_features(video, *args, **kwargs)  # type: ignore[misc]
        return tokens.squeeze(1) if x.ndim == 4 else tokens


class PromptedVisionTransformer(_Prompted, adapter.TemporalVisionTransformer):
    """timm's ``VisionTransformer`` with prompts, for videos ``[B, T, C, H, W]`` and images."""

    plain = VisionTransformer

    def _through_blocks(self, video: Tensor) -> Tensor:
        tokens = self.patch_drop(self._pos_embed(self.patch_embed(video.flatten(0, 1))))
        tokens = tokens.unflatten(0, video.shape[:2])
        return self._through(tokens, self.norm_pre, list(self.blocks), self.grad_checkpointing)


class PromptedTemporalVisionTransformer(NeighboursSeen, PromptedVisionTransformer):
    """The same for an expanded tower."""

    plain = adapter.TemporalVisionTransformer


class PromptedEva(_Prompted, adapter.TemporalEva):
    """timm's ``Eva`` with prompts, for videos ``[B, T, C, H, W]`` and images."""

    plain = Eva

    def _through_blocks(self, video: Tensor) -> Tensor:
        clips = video.shape[:2]
        tokens, rope = self._pos_embed(self.patch_embed(video.flatten(0, 1)))
        of_layers = adapter.rope_by_layer(self, rope, clips)
        blocks = [
            partial(_run, block, angles, self.num_prefix_tokens)
            for block, angles in zip(self.blocks, of_layers, strict=True)
        ]
        tokens = tokens.unflatten(0, clips)
        return self._through(tokens, self.norm_pre, blocks, self.grad_checkpointing)


class PromptedTemporalEva(NeighboursSeen, PromptedEva):
    """The same for an expanded tower."""

    plain = adapter.TemporalEva


def _run(block: nn.Module, angles: Tensor | None, prefix: int, x: Tensor) -> Tensor:
    """A block on patch tokens that are turned by their angles, and on prompts that are not."""
    if angles is not None:
        if angles.ndim == 5 and x.ndim == 3:  # each frame has its own, and stands on its own
            angles = angles.flatten(0, 1)
        angles = _with_still_ones(angles, x.shape[-2] - prefix)
    out: Tensor = block(x, rope=angles)
    return out


def _with_still_ones(angles: Tensor, count: int) -> Tensor:
    """Angles ``[..., N, 2 d]`` (sines, then cosines) with turns by zero after them, for N = count.

    Prompts stand after the patches and have no place in the image: turned by zero, their queries
    and keys stay as they are.
    """
    beyond = (0, 0, 0, count - angles.shape[-2])
    sines, cosines = angles.chunk(2, dim=-1)
    return torch.cat(
        [functional.pad(sines, beyond), functional.pad(cosines, beyond, value=1.0)], dim=-1
    )


PROMPTED = {
    one.plain: one
    for one in (
        PromptedVisionTransformer,
        PromptedTemporalVisionTransformer,
        PromptedEva,
        PromptedTemporalEva,
    )
}
"""Each class of tower that takes prompts, and the class that it has with them."""
