"""The vision models of Hugging Face's CLIP and SigLIP with prompts (transformers 5)."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

from openvclip.errors import UsageError
from openvclip.towers import hf as adapter
from openvclip.towers.prompted import NeighboursSeen, PromptedTower, TowerFacts


class _Prompted(PromptedTower):
    """What the vision models have in common."""

    @staticmethod
    def facts(tower: Any) -> TowerFacts:
        """What there is to know of the tower."""
        embeddings, layers = tower.embeddings, tower.encoder.layers
        class_token = getattr(embeddings, "class_embedding", None)
        return TowerFacts(
            width=embeddings.embed_dim,
            layers=len(layers),
            heads=layers[0].self_attn.num_heads,
            patch_size=(embeddings.patch_size,) * 2,
            image_size=(embeddings.image_size,) * 2,
            feature_size=None,
            prefix=0 if class_token is None else 1,
            class_token=class_token is not None,
            first_weight=(
                embeddings.patch_embedding.weight if class_token is None else class_token
            ),
        )

    def forward(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Frames' ``pooler_output`` ``[B, T, D]`` and ``last_hidden_state`` ``[B, T, N, D]``.

        Images ``[B, C, H, W]`` are clips of one frame, whose outputs have no axis T.

        Raises:
            VideoShapeError: neither an image batch nor a video of the tower's frame size, or a
                clip length that the prompts were not made for.
            UsageError: ``output_hidden_states``, ``output_attentions`` or ``attention_mask``.
        """
        default = getattr(self.config, "output_hidden_states", False)  # type: ignore[attr-defined]
        if kwargs.get("output_hidden_states", default):
            raise UsageError(
                "output_hidden_states knows nothing of prompts. Turn it off, or detach the prompts "
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
        # A layer checkpoints itself where it is told to.
        blocks = [partial(layer, attention_mask=None, **kwargs) for layer in layers]
        return self._through(tokens, getattr(self, "pre_layrnorm", nn.Identity()), blocks)


class PromptedCLIPVisionModel(_Prompted, adapter.TemporalCLIPVisionModel):
    """``CLIPVisionModel`` with prompts, for videos ``[B, T, C, H, W]`` and images."""

    plain = CLIPVisionModel


class PromptedTemporalCLIPVisionModel(NeighboursSeen, PromptedCLIPVisionModel):
    """The same for an expanded model."""

    plain = adapter.TemporalCLIPVisionModel


class PromptedSiglipVisionModel(_Prompted, adapter.TemporalSiglipVisionModel):
    """``SiglipVisionModel`` with prompts, for videos ``[B, T, C, H, W]`` and images."""

    plain = SiglipVisionModel


class PromptedTemporalSiglipVisionModel(NeighboursSeen, PromptedSiglipVisionModel):
    """The same for an expanded model."""

    plain = adapter.TemporalSiglipVisionModel


PROMPTED = {
    one.plain: one
    for one in (
        PromptedCLIPVisionModel,
        PromptedTemporalCLIPVisionModel,
        PromptedSiglipVisionModel,
        PromptedTemporalSiglipVisionModel,
    )
}
"""Each class of tower that takes prompts, and the class that it has with them."""

for _plain, _prompted in PROMPTED.items():
    adapter.take_the_place_of(_plain, _prompted)
