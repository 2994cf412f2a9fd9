"""The parts of a CLIP that are exported, each as a module of one tensor.

The inputs of a part are normalised float frames ``[B, T, 3, size, size]``, 8-bit frames of the same
shape, or token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import UsageError
from openvclip.models.classifier import TextClassifier
from openvclip.models.features import encode_text, similarity_logits
from openvclip.towers.prompted import PromptedTower
from openvclip.towers.temporal import encode_frames, encode_video
from openvclip.towers.view import Pooling
from openvclip.video.transforms import Transform

Part = Literal["image", "frames", "text", "labels"]
"""The part of a model that is exported.

- ``"image"``: one feature of unit length for each clip, ``[B, D]``.
- ``"frames"``: one feature for each frame, ``[B, T, D]``, neither normalised nor pooled.
- ``"text"``: one feature of unit length for each text, ``[N, D]``.
- ``"labels"``: the logits of fixed labels, ``[B, K]``.
"""
PixelKind = Literal["float", "uint8"]
"""The frames that an exported model takes: normalised floats, or 8-bit pixels."""

_LONG_TEXT = "a " * 2000  # longer than the context of any text tower


class VideoPart(nn.Module):
    """A function of normalised frames, after the normalisation of 8-bit frames if that is wanted.

    Args:
        model: the model whose weights the function uses.
        function: a function from normalised frames ``[B, T, 3, size, size]`` to the output.
        pixels: the normalisation of the frames. ``None``: the frames are normalised already.
    """

    def __init__(
        self, model: nn.Module, function: Callable[[Tensor], Tensor], pixels: Transform | None
    ) -> None:
        super().__init__()
        self.model = model
        self._function = function
        self._pixels = pixels

    def forward(self, frames: Tensor) -> Tensor:
        """Return the output for frames ``[B, T, 3, size, size]``."""
        if self._pixels is not None:
            frames = self._pixels.normalise(frames.to(torch.float32))
        return self._function(frames)


class TextPart(nn.Module):
    """The features of texts.

    Args:
        model: a CLIP model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return features of unit length ``[N, D]`` for token ids ``[N, L]``."""
        return functional.normalize(encode_text(self.model, tokens), dim=-1)


def frame_features(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the function of frames for the part ``"frames"``."""
    return lambda frames: encode_frames(model, frames)


def clip_features(model: nn.Module, pooling: Pooling) -> Callable[[Tensor], Tensor]:
    """Return the function of frames for the part ``"image"``."""
    return lambda frames: encode_video(model, frames, normalize=True, pooling=pooling)


def label_logits(
    model: nn.Module, text_features: Tensor, pooling: Pooling
) -> Callable[[Tensor], Tensor]:
    """Return the function of frames for the part ``"labels"``.

    Args:
        model: a CLIP model.
        text_features: ``[K, D]``, unit length.
        pooling: how the features of frames become the feature of a clip.
    """

    def logits(frames: Tensor) -> Tensor:
        features = encode_video(model, frames, pooling=pooling)
        return similarity_logits(model, features, text_features)

    return logits


def classifier_logits(
    classifier: TextClassifier, text_features: Tensor
) -> Callable[[Tensor], Tensor]:
    """Return the function of frames that a classifier computes with fixed text features."""

    def logits(frames: Tensor) -> Tensor:
        with classifier.using_text(text_features):
            result: Tensor = classifier(frames)
            return result

    return logits


def example_tokens(model: nn.Module, tokenizer: Callable[[list[str]], Tensor] | None) -> Tensor:
    """Return token ids of two texts with the length that the text tower takes.

    Args:
        model: a CLIP model.
        tokenizer: a function from texts to token ids. Default: the length is read from the model.

    Raises:
        UsageError: there is no tokenizer, and the length of a text is not known; or the text tower
            has prompts.
    """
    prompts = getattr(model, "openvclip_prompts", None)
    if getattr(prompts, "text", None) is not None:
        raise UsageError(
            "The model has text prompts, which belong to class names, so texts have no features of "
            'their own. Export a classifier with part="labels" instead.'
        )
    if tokenizer is not None:
        return tokenizer([_LONG_TEXT, "a"])
    clip: Any = model
    text_config = getattr(getattr(clip, "config", None), "text_config", None)
    length = getattr(text_config, "max_position_embeddings", None)
    if length is None:
        length = getattr(getattr(clip, "text", clip), "context_length", None)
    if length is None:
        raise UsageError(
            f"The length of a text of {type(model).__name__} is not known. Give tokenizer=, a "
            "function from a list of texts to token ids [n, L]."
        )
    return torch.zeros(2, int(length), dtype=torch.long)


def fixed_frames(model: nn.Module) -> int | None:
    """Return the number of frames that the prompts of a model are for, or ``None`` for any."""
    for module in model.modules():
        if isinstance(module, PromptedTower):
            return module.vision_prompts.fixed_frames
    return None
