"""Mean-pooled video features, and a classifier with a trainable text tower or text prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import ClassNamesError, PromptingError
from openvclip.models.classifier import TextClassifier, fill_template, require_names
from openvclip.models.features import (
    device_of,
    encode_text,
    require_clip,
    similarity_logits,
    video_features,
)
from openvclip.models.finite import require_finite
from openvclip.models.labels import warn_of_equal_labels
from openvclip.models.modes import evaluation_mode
from openvclip.models.text_weights import text_state
from openvclip.models.tokenizers import Tokenizer, as_tokenizer, tokens_of
from openvclip.prompting.attach import has_prompts, prompts_of
from openvclip.prompting.text import TextPrompts, encode_prompted, prompted_layout
from openvclip.towers.temporal import encode_video
from openvclip.towers.view import Pooling, require_pooling

PHOTO_TEMPLATE = "a photo of a {}."
"""The template that ViFi-CLIP fine-tunes with."""


def mean_pooled_features(model: nn.Module, video: Tensor) -> Tensor:
    """Return one feature per clip as in ViFi-CLIP and Vita-CLIP: the normalised mean of the frames.

    The frame features are averaged before the normalisation, so a frame with a longer feature
    vector has more weight. In contrast, :func:`openvclip.encode_video` normalises each frame
    feature first, so all frames have the same weight, and normalises the mean on request only.
    This is ``encode_video(model, video, pooling="frames")``.

    Args:
        model: an open_clip model with or without prompts, or another model that
            :func:`openvclip.encode_video` supports.
        video: normalised frames ``[B, T, C, H, W]``, floating point.

    Returns:
        Tensor ``[B, D]`` with rows of unit length.

    Raises:
        VideoShapeError: see :func:`openvclip.encode_video`.
        UnsupportedModelError: see :func:`openvclip.encode_video`.
    """
    return encode_video(model, video, pooling="frames")


class VideoClassifier(TextClassifier):
    """A CLIP and a list of class names as a classifier with a trainable text side.

    Each forward pass encodes the class names again. Gradients therefore reach the text tower or the
    text prompts, and the text features always belong to the current weights. Use
    :meth:`fixed_text` to encode the class names once if the text side does not change, for example
    in evaluation.

    Args:
        model: an open_clip model with or without prompts, or a model of transformers such as
            ``CLIPModel`` or ``SiglipModel``. It becomes a submodule.
        tokenizer: function that maps a list of texts to token ids, such as the result of
            ``open_clip.get_tokenizer``; or a tokenizer or processor of transformers, see
            :func:`openvclip.models.as_tokenizer`.
        class_names: K different names.
        template: text with ``{}`` in place of the class name. ``"{}"`` is the class name alone.
            Default: the learned text prompts around ``"{}."`` if the model has text prompts,
            otherwise :data:`PHOTO_TEMPLATE`.
        pooling: how the features of the frames become one feature, see
            :func:`openvclip.encode_video`. Default: as in ViFi-CLIP.

    Raises:
        ClassNamesError: if there are no names, if a name is empty or occurs twice, if the text
            prompts are class-specific and were learned without one of the names, or if the template
            has no ``{}``.
        PromptOptionError: if a class name and the text prompts exceed the text context.
        UnsupportedModelError: if the model has no image tower, text tower or temperature.

    Warns:
        LabelWarning: the token ids of some class names are equal.
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
        *,
        pooling: Pooling = "frames",
    ) -> None:
        super().__init__()
        require_clip(model)
        require_pooling(pooling)
        self.pooling: Pooling = pooling
        self.class_names = require_names(class_names)
        self.model = model
        tokenize = as_tokenizer(tokenizer, model)
        self._fixed: Tensor | None = None
        prompts = prompts_of(model).text if template is None and has_prompts(model) else None
        self.prompts_per_text = 0 if prompts is None else prompts.count
        if prompts is not None:
            self._register_layout(prompts, tokenize)
            return
        template = PHOTO_TEMPLATE if template is None else template
        if not isinstance(template, str):
            raise ClassNamesError(
                f"template is a {type(template).__name__}; expected one text, such as "
                f"{PHOTO_TEMPLATE!r}."
            )
        texts = [fill_template(template, name) for name in self.class_names]
        self._register("tokens", tokens_of(tokenize, texts))
        warn_of_equal_labels(self.class_names, self.tokens.flatten(1))

    def forward(self, video: Tensor) -> Tensor:
        """Return the logits of clips: temperature times cosine similarity.

        If the model has a ``logit_bias`` (SigLIP), the bias is added.

        Args:
            video: normalised frames ``[B, T, C, H, W]``, floating point; or images
                ``[B, C, H, W]``, see :meth:`openvclip.ZeroShotClassifier.forward`.

        Returns:
            Tensor ``[B, K]``.

        Raises:
            VideoShapeError: if the video has the wrong rank, dtype, number of channels, frame size
                or number of frames.
        """
        features = video_features(self.model, video, self.pooling)
        text = self.text_features() if self._fixed is None else self._fixed
        return similarity_logits(self.model, features, text)

    def text_features(self) -> Tensor:
        """Return the features ``[K, D]`` of the classes, with rows of unit length.

        They are computed from the current weights.

        Raises:
            PromptingError: if the text prompts of the model were removed or replaced.
        """
        if self.prompts_per_text == 0:
            return functional.normalize(encode_text(self.model, self.tokens), dim=-1)
        prompts = prompts_of(self.model).text
        if prompts is None or prompts.count != self.prompts_per_text:
            raise PromptingError(
                f"The classifier was made for {self.prompts_per_text} prompts a text; the model "
                f"has {0 if prompts is None else prompts.count} now. Make a new classifier."
            )
        layout = (self.tokens, self.places)
        return functional.normalize(encode_prompted(self.model, prompts, self.rows, layout), dim=-1)

    @contextmanager
    def fixed_text(self) -> Iterator[None]:
        """Encode the class names once, without gradients, and use the features within the block."""
        with torch.no_grad():
            fixed = self.text_features()
        with self.using_text(fixed):
            yield

    @torch.no_grad()
    def present_text(self) -> Tensor:
        """Return the text features ``[K, D]`` at the present weights of the model, in eval mode."""
        with evaluation_mode(self.model):
            features = self.text_features()
        require_finite(features, lambda: text_state(self.model), "The text features")
        return features

    @contextmanager
    def using_text(self, features: Tensor) -> Iterator[None]:
        """Context manager in which the classifier uses these text features ``[K, D]``."""
        previous, self._fixed = self._fixed, features
        try:
            yield
        finally:
            self._fixed = previous

    def _register_layout(self, prompts: TextPrompts, tokenizer: Tokenizer) -> None:
        rows = prompts.rows_of(self.class_names)
        tokens, places = prompted_layout(self.model, tokenizer, self.class_names, prompts)
        self._register("tokens", tokens)
        self._register("places", places)
        self._register("rows", None if rows is None else torch.tensor(rows))
        if rows is None:
            warn_of_equal_labels(self.class_names, torch.cat([tokens, places], dim=1))

    def _register(self, name: str, value: Tensor | None) -> None:
        device = device_of(self.model)
        self.register_buffer(name, None if value is None else value.to(device), persistent=False)
