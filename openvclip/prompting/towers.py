"""The image tower of open_clip with prompts: its forward pass, and what prompts offer it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openvclip.adapters.attention import TemporalTower, require_video
from openvclip.adapters.open_clip import TemporalVisionTransformer
from openvclip.errors import UnsupportedModelError, UsageError


class VisionPrompts(nn.Module):
    """Prompts of an image tower. Tokens are ``[B, T, N, W]``; this class changes none of them.

    The tower calls :meth:`embed` once, :meth:`before` and :meth:`after` around each layer, and
    :meth:`leave` once. What a layer needs to know of the clip it reads from the tokens' shape.
    """

    def embed(self, tokens: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """The first layer's tokens from embedded patches; ``norm`` is the tower's ``ln_pre``."""
        return norm(tokens)

    def before(self, layer: int, tokens: Tensor) -> Tensor:
        """The tokens that a layer is given."""
        return tokens

    def after(self, layer: int, tokens: Tensor) -> Tensor:
        """The tokens that are kept of what a layer gives."""
        return tokens

    def leave(self, tokens: Tensor) -> Tensor:
        """The class and patch tokens, which the tower pools."""
        return tokens


class PromptedVisionTransformer(TemporalTower, VisionTransformer):  # type: ignore[misc]
    """open_clip's ``VisionTransformer`` with prompts, for videos ``[B, T, C, H, W]`` and images."""

    vision_prompts: VisionPrompts

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Features of each frame ``[B, T, D]``; images ``[B, C, H, W]`` are clips of one frame.

        With ``output_tokens`` the patch tokens ``[B, T, N, D]`` come second.

        Raises:
            VideoShapeError: neither an image batch nor a video of the tower's frame size, or a
                clip length that the prompts were not made for.
        """
        video = x.unsqueeze(1) if x.ndim == 4 else x
        require_video(video, self.image_size, self.conv1.weight)
        clips = video.shape[:2]
        tokens = self._embedded(video.flatten(0, 1)).unflatten(0, clips)
        tokens = self.vision_prompts.embed(tokens, self.ln_pre)
        for layer in range(len(self.transformer.resblocks)):
            if self.transformer.grad_checkpointing:
                tokens = checkpoint(self._layer, layer, tokens, use_reentrant=False)
            else:
                tokens = self._layer(layer, tokens)
        pooled, rest = self._pool(self.vision_prompts.leave(tokens).flatten(0, 1))
        if self.proj is not None:
            pooled = pooled @ self.proj
        if x.ndim != 4:
            pooled, rest = pooled.unflatten(0, clips), rest.unflatten(0, clips)
        return (pooled, rest) if self.output_tokens else pooled

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Not for towers with prompts.

        Raises:
            UsageError: always; open_clip's own method would leave the prompts out.
        """
        raise UsageError(
            "forward_intermediates() knows nothing of prompts. Call the tower, or detach the "
            "prompts first: openvclip.prompting.detach(model)."
        )

    def _embedded(self, images: Tensor) -> Tensor:
        """Class and patch tokens ``[n, N, W]`` with their positions, before ``ln_pre``."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        position = self.positional_embedding.to(patches.dtype)
        first = (self.class_embedding.to(patches.dtype) + position[0]).expand(len(images), 1, -1)
        tokens: Tensor = self.patch_dropout(torch.cat([first, patches + position[1:]], dim=1))
        return tokens

    def _layer(self, layer: int, tokens: Tensor) -> Tensor:
        given = self.vision_prompts.before(layer, tokens)
        return self.vision_prompts.after(layer, self._block(layer, given))

    def _block(self, layer: int, tokens: Tensor) -> Tensor:
        """One block of the backbone, each frame on its own."""
        frames = run_block(self.transformer, layer, tokens.flatten(0, 1))
        clips: Tensor = frames.unflatten(0, tokens.shape[:2])
        return clips


class PromptedTemporalVisionTransformer(PromptedVisionTransformer, TemporalVisionTransformer):
    """The same for a tower whose attention was expanded: prompts are seen by neighbours too."""

    def _block(self, layer: int, tokens: Tensor) -> Tensor:
        return run_block(self.transformer, layer, tokens)


def run_block(transformer: Any, layer: int, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """One block of an open_clip ``Transformer``, batch first whatever the block's own layout."""
    block = transformer.resblocks[layer]
    if transformer.batch_first:
        out: Tensor = block(x, attn_mask=attn_mask)
        return out
    turned: Tensor = block(x.transpose(0, 1), attn_mask=attn_mask)
    return turned.transpose(0, 1)


PROMPTED: dict[type[nn.Module], type[PromptedVisionTransformer]] = {
    VisionTransformer: PromptedVisionTransformer,
    TemporalVisionTransformer: PromptedTemporalVisionTransformer,
}
"""Each class of tower that takes prompts, and the class that it has with them."""


def find_tower(model: nn.Module) -> Any:
    """The one tower of ``model`` that prompts can be attached to.

    Raises:
        UnsupportedModelError: there is none, or there are several.
    """
    found = [module for module in model.modules() if type(module) in PROMPTED]
    if len(found) == 1:
        return found[0]
    if found:
        raise UnsupportedModelError(
            f"The model holds {len(found)} towers that prompts could be attached to; expected one. "
            "Pass the one to prompt, for example model.visual."
        )
    visual = getattr(model, "visual", getattr(model, "vision_model", model))
    raise UnsupportedModelError(
        f"The image tower is a {type(visual).__name__}, which takes no prompts. Towers that do: "
        "open_clip's own VisionTransformer (OpenAI, LAION, DataComp, MetaCLIP, CoCa), expanded in "
        "time or not."
    )
