"""Image towers with prompts: the interface of the prompts, and the classes of the towers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openvclip.errors import UsageError
from openvclip.towers.family import TemporalTower

Block = Callable[[Tensor], Tensor]
"""A layer of a tower. Tokens are ``[n, N, W]``, in an expanded tower ``[B, T, N, W]``."""


class VisionPrompts(nn.Module):
    """Base of the prompts of an image tower. This class changes no token.

    Tokens are ``[B, T, N, W]``. The tower calls :meth:`embed` before the first layer,
    :meth:`before_layer` and :meth:`after_layer` around each layer, and :meth:`without_prompts`
    after the last layer. The number of frames is read from the shape of the tokens.
    """

    @property
    def fixed_frames(self) -> int | None:
        """The number of frames that the prompts were learned for; ``None`` for any number."""
        return None

    def embed(self, tokens: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the tokens for the first layer.

        Args:
            tokens: class and patch tokens with their positions.
            norm: normalisation of the tower before its first layer.
        """
        return norm(tokens)

    def before_layer(self, layer: int, tokens: Tensor) -> Tensor:
        """Return the input of a layer from its ``tokens``."""
        return tokens

    def after_layer(self, layer: int, tokens: Tensor) -> Tensor:
        """Return the output tokens of a layer, without prompts that belong to this layer only."""
        return tokens

    def without_prompts(self, tokens: Tensor) -> Tensor:
        """Return the class and patch tokens, which the tower pools."""
        return tokens


class PromptedTower(TemporalTower):
    """Base of the towers with prompts.

    Each layer processes one frame at a time. (:class:`PromptedExpandedTower` processes whole clips,
    for expanded towers.) An image is a clip of one frame. A subclass embeds the patches, passes the
    tokens and its layers to :meth:`_through`, and pools the result.
    """

    vision_prompts: VisionPrompts

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Raise an error: the method of the plain tower would leave the prompts out.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "forward_intermediates() does not support prompts. Call the tower instead, or detach "
            "the prompts first: openvclip.prompting.detach(model)."
        )

    def _through(
        self,
        tokens: Tensor,
        norm: Callable[[Tensor], Tensor],
        blocks: Sequence[Block],
        checkpointing: bool = False,
    ) -> Tensor:
        """Return the output of the last layer for embedded tokens ``[B, T, N, W]``."""
        tokens = self.vision_prompts.embed(tokens, norm)
        for layer, block in enumerate(blocks):
            if checkpointing:
                tokens = checkpoint(self._layer, layer, block, tokens, use_reentrant=False)
            else:
                tokens = self._layer(layer, block, tokens)
        return self.vision_prompts.without_prompts(tokens)

    def _layer(self, layer: int, block: Block, tokens: Tensor) -> Tensor:
        tokens = self.vision_prompts.before_layer(layer, tokens)
        return self.vision_prompts.after_layer(layer, self._run_block(block, tokens))

    def _run_block(self, block: Block, tokens: Tensor) -> Tensor:
        clips: Tensor = block(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        return clips


def is_prompted(model: nn.Module) -> bool:
    """Return whether a tower of ``model`` has prompts."""
    return any(isinstance(module, PromptedTower) for module in model.modules())


class PromptedExpandedTower(PromptedTower):
    """Base of the expanded towers with prompts.

    The tokens of a frame attend to the prompts of the neighbouring frames too.
    """

    def _run_block(self, block: Block, tokens: Tensor) -> Tensor:
        return block(tokens)
