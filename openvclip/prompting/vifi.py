"""ViFi-CLIP (Rasheed et al., CVPR 2023): fine-tuning a whole CLIP on videos, then prompting it.

Fine-tuning adds nothing to the model: :func:`fine_tune` says what is trained, and
:class:`~openvclip.prompting.VideoClassifier` gives the logits. *Bridge and prompt* freezes the
fine-tuned model and learns prompts: :func:`attach_vifi`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from openvclip.errors import PromptingError, PromptOptionError, UnsupportedModelError
from openvclip.prompting.attach import Model, Prompts, attach, has_prompts, require_unprompted
from openvclip.prompting.text import (
    INIT_STD,
    TextPrompts,
    Tokenizer,
    initial_words,
    require_count,
    require_depth,
    require_text_tower,
)
from openvclip.towers.prompted import VisionPrompts, find_tower

Trained = Literal["both", "image", "text"]


def fine_tune(model: nn.Module, train: Trained = "both") -> list[nn.Parameter]:
    """Choose what a video fine-tune trains, and freeze the rest.

    As in the release, the token embedding stays as it is in each variant, and the temperature is
    trained with both towers only.

    Args:
        model: an open_clip model.
        train: ``"both"`` towers and the temperature, the ``"image"`` tower or the ``"text"`` tower.

    Returns:
        The trained parameters, for the optimizer.

    Raises:
        PromptOptionError: ``train`` is unknown.
        PromptingError: the model has prompts, which are trained alone.
        UnsupportedModelError: the model lacks a tower.
    """
    if train not in get_args(Trained):
        raise PromptOptionError(
            f"train={train!r}: expected one of " + ", ".join(map(repr, get_args(Trained))) + "."
        )
    if has_prompts(model):
        raise PromptingError(
            "The model has prompts, and its backbone is frozen beside them. Fine-tune first and "
            "attach prompts then, or call openvclip.prompting.detach(model)."
        )
    named = dict(model.named_parameters())
    image = {name for name in named if name.startswith("visual.")}
    rest = {"logit_scale", "logit_bias"}
    text = {n for n in named if "token_embedding." not in n} - image - rest
    if not image or not text:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no {'text' if image else 'image'} tower; expected an "
            "open_clip model with both. Pass the model itself, not a wrapper around it."
        )
    chosen = {"both": image | text | rest, "image": image, "text": text}[train]
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)
    return [parameter for name, parameter in named.items() if name in chosen]


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
    """Freeze a (fine-tuned) model and give both towers prompts to learn, in place.

    In the first ``depth`` layers of a tower the prompts are fresh ones, which replace what the
    layer before made of its own; deeper layers pass the last ones on. Vision prompts stand after
    the patch tokens, text prompts after the start token (first of all where texts have none, as
    SigLIP's), the same ones for all classes. The
    defaults are those of the base-to-novel setting; few-shot training takes 10 prompts and depth 12
    in both towers.

    Args:
        model: an open_clip model; or with ``text_prompts=0`` any model that
            :func:`openvclip.expand_temporal_attention` takes, expanded or not.
        vision_prompts: prompts of each frame; 0 leaves the image tower as it is.
        text_prompts: prompts of each text; 0 leaves the text tower as it is.
        vision_depth: layers of the image tower with prompts of their own.
        text_depth: layers of the text tower with prompts of their own.
        words: what the text prompts of the first layer start from, for example
            ``"a photo of a"``; prompts beyond these words, and all others, start at random with
            standard deviation 0.02.
        tokenizer: the model's tokenizer, for ``words``.

    Returns:
        ``model`` itself. Its parameters are frozen; :func:`openvclip.prompting.parameters` gives
        the prompts.

    Raises:
        PromptingError: the model has prompts already.
        PromptOptionError: a number is out of range, among them more prompts than the text context
            holds.
        UnsupportedModelError: the model has no tower that takes prompts.
    """
    require_unprompted(model)
    require_count("vision_prompts", vision_prompts)
    require_count("text_prompts", text_prompts)
    if vision_prompts + text_prompts == 0:
        raise PromptOptionError("vision_prompts=0, text_prompts=0: nothing would be learned.")
    vision = text = None
    if vision_prompts:
        tower = find_tower(model).facts
        require_depth("vision_depth", vision_depth, tower.layers)
        vision = ViFiVisionPrompts(vision_prompts, tower.width, vision_depth)
    if text_prompts:
        reader = require_text_tower(model, text_prompts, text_depth)
        text = TextPrompts(text_prompts, reader.transformer.width, depth=text_depth)
        if words is not None:
            _start_from(text, reader, words, tokenizer)
    settings = {
        "vision_prompts": vision_prompts,
        "text_prompts": text_prompts,
        "vision_depth": vision_depth,
        "text_depth": text_depth,
    }
    attach(model, Prompts("vifi", settings, vision, text))
    return model


def _start_from(text: TextPrompts, reader: Any, words: str, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        raise PromptOptionError(f"words={words!r} need the model's tokenizer: tokenizer=...")
    embedded = initial_words(reader, tokenizer, words, text.count)
    with torch.no_grad():
        text.context[: len(embedded)].copy_(embedded)


class ViFiVisionPrompts(VisionPrompts):
    """Prompts after the patch tokens, the same in every frame.

    Attributes:
        tokens: ``[depth, n, W]``; those of layer 0 pass the tower's ``ln_pre`` like patches.
    """

    def __init__(self, count: int, width: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(depth, count, width) * INIT_STD)

    def embed(self, tokens: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
        """Tokens with the first layer's prompts after them."""
        return norm(self._with_prompts(tokens, 0))

    def before(self, layer: int, tokens: Tensor) -> Tensor:
        """Fresh prompts in place of the last ones, in the first ``depth`` layers."""
        if not 0 < layer < len(self.tokens):
            return tokens
        return self._with_prompts(self.leave(tokens), layer)

    def leave(self, tokens: Tensor) -> Tensor:
        """The tokens without prompts."""
        return tokens[:, :, : -self.tokens.shape[1]]

    def _with_prompts(self, tokens: Tensor, layer: int) -> Tensor:
        fresh = self.tokens[layer].to(tokens.dtype).expand(*tokens.shape[:2], -1, -1)
        return torch.cat([tokens, fresh], dim=2)
