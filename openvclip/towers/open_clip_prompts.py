"""open_clip's own ``VisionTransformer`` with prompts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor

from openvclip.towers.attention import require_video
from openvclip.towers.open_clip import TemporalVisionTransformer
from openvclip.towers.prompted import NeighboursSeen, PromptedTower, TowerFacts


class PromptedVisionTransformer(PromptedTower, VisionTransformer):  # type: ignore[misc]
    """open_clip's ``VisionTransformer`` with prompts, for videos ``[B, T, C, H, W]`` and images."""

    plain = VisionTransformer

    @staticmethod
    def facts(tower: Any) -> TowerFacts:
        """What there is to know of the tower."""
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

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Features of each frame ``[B, T, D]``; images ``[B, C, H, W]`` are clips of one frame.

        With ``output_tokens`` the patch tokens ``[B, T, N, D]`` come second.

        Raises:
            VideoShapeError: neither an image batch nor a video of the tower's frame size, or a
                clip length that the prompts were not made for.
        """
        video = x.unsqueeze(1) if isinstance(x, Tensor) and x.ndim == 4 else x
        require_video(video, self.image_size, self.conv1.weight)
        clips = video.shape[:2]
        tokens = self._embedded(video.flatten(0, 1)).unflatten(0, clips)
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

    def _embedded(self, images: Tensor) -> Tensor:
        """Class and patch tokens ``[n, N, W]`` with their positions, before ``ln_pre``."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        position = self.positional_embedding.to(patches.dtype)
        first = (self.class_embedding.to(patches.dtype) + position[0]).expand(len(images), 1, -1)
        tokens: Tensor = self.patch_dropout(torch.cat([first, patches + position[1:]], dim=1))
        return tokens


class PromptedTemporalVisionTransformer(NeighboursSeen, PromptedVisionTransformer):
    """The same for an expanded tower."""

    plain = TemporalVisionTransformer


def run_block(transformer: Any, layer: int, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """One block of an open_clip ``Transformer``, batch first whatever the block's own layout."""
    block = transformer.resblocks[layer]
    if transformer.batch_first:
        out: Tensor = block(x, attn_mask=attn_mask)
        return out
    turned: Tensor = block(x.transpose(0, 1), attn_mask=attn_mask)
    return turned.transpose(0, 1)


PROMPTED = {
    one.plain: one for one in (PromptedVisionTransformer, PromptedTemporalVisionTransformer)
}
"""Each class of tower that takes prompts, and the class that it has with them."""
