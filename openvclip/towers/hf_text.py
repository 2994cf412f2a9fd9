"""The text towers of transformers, as text prompts need them.

The towers are those of CLIP, MetaCLIP 2, CLIPSeg, SigLIP and SigLIP 2. Nothing is imported from
transformers here: the classes are known by their names.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

_CAUSAL = ("CLIPTextModel", "MetaClip2TextModel", "CLIPSegTextModel")
_PADDED = ("SiglipTextModel", "Siglip2TextModel")


class TextTower:
    """The parts of a text tower of transformers, under the names of open_clip's towers.

    Args:
        model: a ``CLIPModel``, ``SiglipModel``, or another model with a text tower of their kind.
    """

    # Layers of transformers do activation checkpointing themselves.
    checkpointing = False

    def __init__(self, model: Any) -> None:
        self._model = model
        self._module = model.text_model
        self._is_causal = type(self._module).__name__ in _CAUSAL

    @property
    def width(self) -> int:
        """Width of the tokens, W."""
        return self.token_embedding.embedding_dim

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self._module.encoder.layers)

    @property
    def context_length(self) -> int:
        """Number of tokens of a text, L."""
        return self.positional_embedding.shape[0]

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.token_embedding.num_embeddings

    @property
    def token_embedding(self) -> nn.Embedding:
        """The layer from token ids to tokens."""
        embedding: nn.Embedding = self._module.embeddings.token_embedding
        return embedding

    @property
    def positional_embedding(self) -> Tensor:
        """The positions ``[L, W]``."""
        positions: Tensor = self._module.embeddings.position_embedding.weight
        return positions

    @property
    def pool_type(self) -> str:
        """Which token becomes the feature: ``"argmax"``, ``"eos"`` or ``"last"``."""
        if not self._is_causal:
            return "last"
        # CLIP's first configurations give 2 as the end token. The end token is then the largest id.
        first = type(self._module).__name__ != "MetaClip2TextModel" and self.end_id == 2
        return "argmax" if first else "eos"

    @property
    def end_id(self) -> int | None:
        """The id of the end token, which ``pool_type`` ``"eos"`` needs."""
        end: int | None = getattr(self._module, "eos_token_id", None)
        return end

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return token embeddings with their positions ``[n, L, W]``, and the attention mask."""
        x: Tensor = self._module.embeddings(input_ids=tokens)
        if not self._is_causal:
            return x, None
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        return x, mask[None, None]

    def run_layer(self, layer: int, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return the output ``[n, L, W]`` of a layer."""
        output: Tensor = self._module.encoder.layers[layer](x, mask)
        return output

    def pool_and_project(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Return the features ``[n, D]`` of texts, not normalised.

        Args:
            tokens: token ids ``[n, L]``.
            x: output of the last layer.
        """
        x = self._module.final_layer_norm(x)
        if not self._is_causal:
            return cast(Tensor, self._module.head(x[:, -1]))
        ids = tokens if self.pool_type == "argmax" else tokens.eq(cast(int, self.end_id)).int()
        rows = torch.arange(len(x), device=x.device)
        return cast(Tensor, self._model.text_projection(x[rows, ids.argmax(dim=-1)]))


def find_text_tower(model: nn.Module) -> TextTower | None:
    """Return the text tower of a model of transformers, or None if it takes no prompts."""
    text = getattr(model, "text_model", None)
    return TextTower(model) if type(text).__name__ in (*_CAUSAL, *_PADDED) else None
