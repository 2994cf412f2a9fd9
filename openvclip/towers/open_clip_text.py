"""The text towers of open_clip, as text prompts need them.

open_clip has two kinds of text towers that take prompts: the ``CLIP`` itself, which holds the parts
of a text tower as its own attributes, and ``TextTransformer``, the attribute ``text`` of the other
models. :class:`TextTower` gives both kinds the same attributes.
"""

from __future__ import annotations

from typing import Any

from open_clip import CLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn

from openvclip.towers.open_clip import run_block


class TextTower:
    """The parts of a text tower of open_clip.

    Args:
        module: a ``CLIP`` or a ``TextTransformer``.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._is_clip = isinstance(module, CLIP)

    @property
    def width(self) -> int:
        """Width of the tokens, W."""
        width: int = self._module.transformer.width
        return width

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._module.transformer.resblocks)

    @property
    def context_length(self) -> int:
        """Number of tokens of a text, L."""
        length: int = self._module.context_length
        return length

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        size: int = self._module.vocab_size
        return size

    @property
    def token_embedding(self) -> nn.Embedding:
        """The layer from token ids to tokens."""
        embedding: nn.Embedding = self._module.token_embedding
        return embedding

    @property
    def positional_embedding(self) -> Tensor:
        """The positions ``[L, W]``."""
        positions: Tensor = self._module.positional_embedding
        return positions

    @property
    def checkpointing(self) -> bool:
        """Whether activation checkpointing is on."""
        return bool(self._module.transformer.grad_checkpointing)

    @property
    def pool_type(self) -> str:
        """Which token becomes the feature: ``"argmax"``, ``"eos"``, ``"last"`` or another."""
        module = self._module
        pool_type: str = module.text_pool_type if self._is_clip else module.pool_type
        return pool_type

    @property
    def end_id(self) -> int | None:
        """The id of the end token if ``pool_type`` is ``"eos"``."""
        end: int | None = self._module.text_eos_id if self._is_clip else self._module.eos_id
        return end

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return token embeddings with their positions ``[n, L, W]``, and the attention mask.

        The class token of CoCa is appended, so that L grows by one.
        """
        module = self._module
        if not self._is_clip:
            x, mask = module._embeds(tokens)  # adds the class token of CoCa, and masks padding
            return x, mask
        dtype = module.transformer.get_cast_dtype()
        x = module.token_embedding(tokens).to(dtype)
        return x + module.positional_embedding.to(dtype), module.attn_mask

    def run_layer(self, layer: int, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the output ``[n, L, W]`` of a layer."""
        return run_block(self._module.transformer, layer, x, mask)

    def pool_and_project(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Return the features ``[n, D]`` of texts, not normalised.

        Args:
            tokens: token ids ``[n, L]``.
            x: output of the last layer.
        """
        features = self._pooled(tokens, x)
        projection = self._module.text_projection
        if projection is None:
            return features
        projected: Tensor = (
            projection(features) if isinstance(projection, nn.Linear) else features @ projection
        )
        return projected

    def _pooled(self, tokens: Tensor, x: Tensor) -> Tensor:
        norm = self._module.ln_final
        pooled: Tensor
        if not self._is_clip and self._module.cls_emb is not None:  # CoCa pools its class token
            pooled = norm(text_global_pool(x, pool_type="last"))
        else:
            pooled = text_global_pool(norm(x), tokens, self.pool_type, eos_token_id=self.end_id)
        return pooled


def find_text_tower(model: nn.Module) -> TextTower | None:
    """Return the text tower of a model, or None if it is not a text tower that takes prompts."""
    module = model if isinstance(model, CLIP) else getattr(model, "text", None)
    return TextTower(module) if isinstance(module, (CLIP, TextTransformer)) else None
