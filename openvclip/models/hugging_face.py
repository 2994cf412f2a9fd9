"""Hugging Face's CLIP with the two methods that a classifier of videos calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from openvclip.video import transforms
from openvclip.video.transforms import Transform


class HuggingFaceCLIP(CLIPModel):  # type: ignore[misc]
    """``CLIPModel`` under its own names, so that its weights stay what transformers loads."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Projected features ``[B, D]`` of images; ``[B, T, D]`` of videos once expanded."""
        features: Tensor = self.get_image_features(pixel_values=pixels).pooler_output
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Projected features ``[B, D]`` of texts."""
        features: Tensor = self.get_text_features(input_ids=tokens).pooler_output
        return features


def load(name: str) -> tuple[HuggingFaceCLIP, Callable[[list[str]], Tensor], Transform]:
    """A model by its name or folder, in eval mode, with its tokenizer and training pixels."""
    model: HuggingFaceCLIP = HuggingFaceCLIP.from_pretrained(name)
    processor = CLIPImageProcessor.from_pretrained(name)
    size = model.config.vision_config.image_size
    pixels = transforms.build("train", size, mean=processor.image_mean, std=processor.image_std)
    encode: Any = AutoTokenizer.from_pretrained(name)
    length = model.config.text_config.max_position_embeddings

    def tokenizer(texts: list[str]) -> Tensor:
        tokens: Tensor = encode(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return tokens

    return model.eval(), tokenizer, pixels
