"""Hugging Face CLIP models with the methods ``encode_image`` and ``encode_text``.

Importing this module imports transformers. Import this module inside a function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from openvclip.video import transforms
from openvclip.video.transforms import Transform


class HuggingFaceCLIP(CLIPModel):  # type: ignore[misc]
    """A ``CLIPModel`` with the methods that :class:`~openvclip.ZeroShotClassifier` calls.

    The names of the weights are the names of ``CLIPModel``, so transformers can load them.
    """

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Return the projected features of images or videos.

        Args:
            pixels: images ``[B, C, H, W]``, or videos ``[B, T, C, H, W]`` for an expanded model.

        Returns:
            ``[B, D]`` for images, ``[B, T, D]`` for videos.
        """
        features: Tensor = self.get_image_features(pixel_values=pixels).pooler_output
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return the projected features ``[B, D]`` of texts, given as token ids ``[B, L]``."""
        features: Tensor = self.get_text_features(input_ids=tokens).pooler_output
        return features


def load(name: str) -> tuple[HuggingFaceCLIP, Callable[[list[str]], Tensor], Transform]:
    """Load a CLIP model of Hugging Face, its tokenizer and its training transform.

    Args:
        name: the name of a model on the Hugging Face Hub, or a folder.

    Returns:
        The model in eval mode, a function from texts to token ids ``[B, L]``, and a transform with
        the name ``"train"`` and with the size, mean and standard deviation of the model.
    """
    model: HuggingFaceCLIP = HuggingFaceCLIP.from_pretrained(name)
    processor = CLIPImageProcessor.from_pretrained(name)
    size = model.config.vision_config.image_size
    transform = transforms.build("train", size, mean=processor.image_mean, std=processor.image_std)
    encode: Any = AutoTokenizer.from_pretrained(name)
    length = model.config.text_config.max_position_embeddings

    def tokenizer(texts: list[str]) -> Tensor:
        tokens: Tensor = encode(
            texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        return tokens

    return model.eval(), tokenizer, transform
