"""Pooling as ViFi-CLIP and Vita-CLIP do it, and a classifier whose text side can be trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import ClassNamesError, PromptingError
from openvclip.models.classifier import fill_template, require_clip, require_names
from openvclip.prompting.attach import has_prompts, prompts_of
from openvclip.prompting.text import TextPrompts, Tokenizer, encode_prompted, prompted_layout
from openvclip.towers.temporal import encode_frames

PHOTO_TEMPLATE = "a photo of a {}."
"""The template of ViFi-CLIP's fine-tuning."""


def encode_video(model: nn.Module, video: Tensor) -> Tensor:
    """Feature of each clip as ViFi-CLIP and Vita-CLIP have it: frames' mean, then unit length.

    :func:`openvclip.encode_video` has it the other way round: the mean of features that each
    have unit length, and is not normalised again. There all frames weigh the same; here a frame
    weighs by the length of its feature.

    Args:
        model: an open_clip model with prompts or without, or another that
            :func:`openvclip.encode_video` takes.
        video: normalised frames ``[B, T, C, H, W]``, floating point.

    Returns:
        ``[B, D]``, unit length.

    Raises:
        VideoShapeError, UnsupportedModelError: as for :func:`openvclip.encode_video`.
    """
    return functional.normalize(encode_frames(model, video).mean(dim=1), dim=-1)


class VideoClassifier(nn.Module):
    """A CLIP and a list of class names as a classifier whose text side can be trained.

    The text features are made anew in each forward pass, so that gradients reach the text tower
    or the text prompts, and weights that change (in a sweep, say) are those that count. Where the
    text side stands still, in evaluation or where only images are trained,
    :meth:`fixed_text` makes them once.

    Args:
        model: an open_clip model with or without prompts; kept as a submodule.
        tokenizer: turns a list of texts into token ids, as ``open_clip.get_tokenizer`` gives it.
        class_names: K names, no two alike.
        template: text with ``{}`` for the class name; ``"{}"`` is the class name alone. Default:
            the learned text prompts around ``"{}."`` where the model has some, else
            :data:`PHOTO_TEMPLATE`.

    Raises:
        ClassNamesError: no names, empty or duplicate ones, names that class-specific prompts were
            not made for, or a template without ``{}``.
        PromptOptionError: a class name is too long beside the text prompts.
        UnsupportedModelError: the model lacks a tower or the temperature.
    """

    tokens: Tensor
    places: Tensor
    rows: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        class_names: Sequence[str],
        template: str | None = None,
    ) -> None:
        super().__init__()
        require_clip(model)
        self.class_names = require_names(class_names)
        self.model = model
        self._fixed: Tensor | None = None
        text = prompts_of(model).text if template is None and has_prompts(model) else None
        self.prompts_per_text = 0 if text is None else text.count
        if text is not None:
            self._lay_out(text, tokenizer)
            return
        form = PHOTO_TEMPLATE if template is None else template
        if not isinstance(form, str):
            raise ClassNamesError(f"template is a {type(form).__name__}; expected one text.")
        self._keep("tokens", tokenizer([fill_template(form, name) for name in self.class_names]))

    def forward(self, video: Tensor) -> Tensor:
        """Logits ``[B, K]`` of clips ``[B, T, C, H, W]``: scale times cosine similarity.

        Raises:
            VideoShapeError: wrong rank, dtype, channels, frame size or number of frames.
        """
        pooled = encode_video(self.model, video)
        text = self.text_features() if self._fixed is None else self._fixed
        scale = cast(Any, self.model).logit_scale.exp()
        logits: Tensor = scale * pooled @ text.to(pooled.dtype).T
        return logits

    def text_features(self) -> Tensor:
        """Features ``[K, D]`` of the classes, unit length, from the weights as they are now.

        Raises:
            PromptingError: the text prompts were taken out of the model, or others put in.
        """
        clip = cast(Any, self.model)
        if self.prompts_per_text == 0:
            return functional.normalize(clip.encode_text(self.tokens), dim=-1)
        text = prompts_of(self.model).text
        if text is None or text.count != self.prompts_per_text:
            raise PromptingError(
                f"The classifier was made for {self.prompts_per_text} prompts a text; the model "
                f"has {0 if text is None else text.count} now. Make a new classifier."
            )
        layout = (self.tokens, self.places)
        return functional.normalize(encode_prompted(clip, text, self.rows, layout), dim=-1)

    @contextmanager
    def fixed_text(self) -> Iterator[None]:
        """Within the block the text features stay as they are at its start, without gradients."""
        with torch.no_grad():
            fixed = self.text_features()
        before, self._fixed = self._fixed, fixed
        try:
            yield
        finally:
            self._fixed = before

    def _lay_out(self, text: TextPrompts, tokenizer: Tokenizer) -> None:
        rows = text.rows_of(self.class_names)
        layout = prompted_layout(self.model, tokenizer, self.class_names, text.count, text.name_at)
        for name, value in zip(("tokens", "places"), layout, strict=True):
            self._keep(name, value)
        self._keep("rows", None if rows is None else torch.tensor(rows))

    def _keep(self, name: str, value: Tensor | None) -> None:
        device = cast(Any, self.model).logit_scale.device
        self.register_buffer(name, None if value is None else value.to(device), persistent=False)
