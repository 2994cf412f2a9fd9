"""ViFi-CLIP (Rasheed et al., CVPR 2023): fine-tuning a whole CLIP on videos, then prompting it.

Fine-tuning adds nothing to the model. :func:`fine_tune` selects the trained parameters, and
:class:`~openvclip.prompting.VideoClassifier` computes the logits. *Bridge and prompt* then freezes
the fine-tuned model and trains prompts, which :func:`attach_vifi` adds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from openvclip.errors import PromptingError, PromptOptionError, UnsupportedModelError
from openvclip.models.tokenizers import Tokenizer, as_tokenizer
from openvclip.prompting.attach import Model, Prompts, attach, has_prompts, require_unprompted
from openvclip.prompting.text import INIT_STD, TextPrompts, initial_words
from openvclip.prompting.text_towers import (
    require_count,
    require_depth,
    require_text_tower,
    text_tower,
)
from openvclip.towers.families import tower_facts
from openvclip.towers.prompted import VisionPrompts

Trained = Literal["both", "image", "text"]
"""The towers that a video fine-tune trains."""

# Beginnings of names in open_clip, and in transformers.
_IMAGE_TOWER = ("visual.", "vision_model.", "visual_projection.")
_TEMPERATURE = ("logit_scale", "logit_bias", "temperature")
_WORDS = ("token_embedding.", "word_embeddings.")


def fine_tune(model: nn.Module, train: Trained = "both") -> list[nn.Parameter]:
    """Select the parameters that a video fine-tune trains, and freeze all others.

    As in the release, the token embedding is always frozen, and the temperature is trained only
    together with both towers.

    Args:
        model: an open_clip model, or a model of transformers such as ``CLIPModel``.
        train: ``"both"`` for both towers and the temperature, ``"image"`` for the image tower, or
            ``"text"`` for the text tower. Default: ``"both"``.

    Returns:
        The trained parameters, for an optimizer.

    Raises:
        PromptOptionError: if ``train`` is unknown.
        PromptingError: if the model has prompts, which are trained with a frozen backbone.
        UnsupportedModelError: if the model has no image tower or no text tower.
    """
    if train not in get_args(Trained):
        names = ", ".join(repr(name) for name in get_args(Trained))
        raise PromptOptionError(f"train={train!r}: expected one of {names}.")
    if has_prompts(model):
        raise PromptingError(
            "The model has prompts, so its backbone is frozen. Fine-tune the model before you "
            "attach prompts, or call openvclip.prompting.detach(model)."
        )
    named = dict(model.named_parameters())
    image = {name for name in named if name.startswith(_IMAGE_TOWER)}
    temperature = {name for name in named if name in _TEMPERATURE}
    words = {name for name in named if any(part in name for part in _WORDS)}
    text = named.keys() - words - image - temperature
    if not image or not text:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {'text' if image else 'image'} tower; expected a "
            "model of open_clip or transformers with both towers. Pass the model itself, not a "
            "wrapper around it."
        )
    trained = {"both": image | text | temperature, "image": image, "text": text}[train]
    for name, parameter in named.items():
        parameter.requires_grad_(name in trained)
    return [parameter for name, parameter in named.items() if name in trained]


def attach_vifi(
    model: Model,
    *,
    vision_prompts: int = 16,
    text_prompts: int = 16,
    vision_depth: int = 9,
    text_depth: int = 9,
    words: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> Model:
    """Freeze a (fine-tuned) model and attach the prompts of ViFi-CLIP to both towers, in place.

    Each of the first ``depth`` layers of a tower has its own prompts. They replace the outputs of
    the previous layer at the same places. Deeper layers get no new prompts: there, the outputs of
    the previous layer stay at these places. Vision prompts stand after the patch tokens. Text
    prompts stand after the start token, or first if texts have no start token (SigLIP). All classes
    share the text prompts.

    The defaults are the base-to-novel setting. Few-shot training uses 10 prompts and depth 12 in
    both towers.

    Args:
        model: an open_clip model, or a model of transformers such as ``CLIPModel`` or
            ``SiglipModel``. With ``text_prompts=0``: any model that
            :func:`openvclip.expand_temporal_attention` supports, expanded or not.
        vision_prompts: number of prompts in each frame. With 0 the image tower gets no prompts.
            Default: 16.
        text_prompts: number of prompts in each text. With 0 the text tower gets no prompts.
            Default: 16.
        vision_depth: number of layers of the image tower with their own prompts. Default: 9.
        text_depth: number of layers of the text tower with their own prompts. Default: 9.
        words: text whose token embeddings initialise the first text prompts of the first layer, for
            example ``"a photo of a"``. All other prompts are initialised randomly with standard
            deviation 0.02. Default: all prompts are initialised randomly.
        tokenizer: the tokenizer of the model. Required with ``words``.

    Returns:
        ``model``. Its parameters are frozen. :func:`openvclip.prompting.parameters` returns the
        trained parameters of the prompts.

    Raises:
        PromptingError: if the model has prompts already.
        PromptOptionError: if an argument is out of range, or if the prompts exceed the text
            context.
        UnsupportedModelError: if the model has no tower that supports prompts.
    """
    require_unprompted(model)
    require_count("vision_prompts", vision_prompts)
    require_count("text_prompts", text_prompts)
    if vision_prompts + text_prompts == 0:
        raise PromptOptionError(
            "vision_prompts=0, text_prompts=0: nothing would be learned. Ask for prompts in one "
            "tower or in both."
        )
    vision = text = None
    if vision_prompts:
        facts = tower_facts(model)
        require_depth("vision_depth", vision_depth, facts.layers)
        vision = ViFiVisionPrompts(vision_prompts, facts.width, vision_depth)
    if text_prompts:
        tower = require_text_tower(model, text_prompts, text_depth)
        text = TextPrompts(text_prompts, tower.width, depth=text_depth)
        if words is not None:
            _initialise(text, model, words, tokenizer)
    settings = {
        "vision_prompts": vision_prompts,
        "text_prompts": text_prompts,
        "vision_depth": vision_depth,
        "text_depth": text_depth,
    }
    attach(model, Prompts("vifi", settings, vision, text))
    return model


def _initialise(
    prompts: TextPrompts, model: nn.Module, words: str, tokenizer: Tokenizer | None
) -> None:
    if tokenizer is None:
        raise PromptOptionError(f"words={words!r} need the model's tokenizer: tokenizer=...")
    tokenize = as_tokenizer(tokenizer, model)
    embedded = initial_words(text_tower(model), tokenize, words, prompts.count)
    with torch.no_grad():
        prompts.context[: len(embedded)].copy_(embedded)


class ViFiVisionPrompts(VisionPrompts):
    """The vision prompts of ViFi-CLIP. They stand after the patch tokens of every frame.

    Attributes:
        tokens: ``[depth, n, W]``. The prompts of layer 0 pass the normalisation before the first
            layer (``ln_pre``) together with the patch tokens.
    """

    def __init__(self, count: int, width: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(depth, count, width) * INIT_STD)

    def embed(self, tokens: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the tokens followed by the prompts of the first layer."""
        return norm(self._with_prompts(tokens, 0))

    def before_layer(self, layer: int, tokens: Tensor) -> Tensor:
        """Replace the prompts by those of the layer, in the first ``depth`` layers."""
        if not 0 < layer < len(self.tokens):
            return tokens
        return self._with_prompts(self.without_prompts(tokens), layer)

    def without_prompts(self, tokens: Tensor) -> Tensor:
        """Return the class and patch tokens."""
        return tokens[:, :, : -self.tokens.shape[1]]

    def _with_prompts(self, tokens: Tensor, layer: int) -> Tensor:
        prompts = self.tokens[layer].to(tokens.dtype).expand(*tokens.shape[:2], -1, -1)
        return torch.cat([tokens, prompts], dim=2)
