"""Zero-shot classification of images and videos: templates, text features, classifier."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.commands.progress import progress_bar
from openvclip.errors import ClassNamesError, TextFeaturesWarning
from openvclip.models.features import (
    encode_text,
    require_clip,
    similarity_logits,
    video_features,
)
from openvclip.models.finite import require_finite, require_values
from openvclip.models.labels import warn_of_equal_labels
from openvclip.models.modes import evaluation_mode
from openvclip.models.text_cache import cached_features
from openvclip.models.text_weights import TextMark, text_state
from openvclip.models.tokenizers import Tokenizer, as_tokenizer, tokens_of
from openvclip.towers.view import Pooling, require_pooling

Template = str | Callable[[str], str]
"""A string in which the class name replaces ``{}``, or a function from a class name to a text."""

_NOUNS = ("photo", "video", "example", "demonstration")
_FORMS = (
    "a {noun} of {{}}.",
    "a {noun} of a person {{}}.",
    "a {noun} of a person using {{}}.",
    "a {noun} of a person doing {{}}.",
    "a {noun} of a person during {{}}.",
    "a {noun} of a person performing {{}}.",
    "a {noun} of a person practicing {{}}.",
)

VIDEO_TEMPLATES: tuple[str, ...] = tuple(
    form.format(noun=noun) for noun, form in product(_NOUNS, _FORMS)
)
"""The 28 text templates of the released code. The class name replaces ``{}``."""


class TextClassifier(nn.Module, ABC):
    """Base of the classifiers that compare images or videos with texts of class names.

    Attributes:
        class_names: K different class names.
        model: the CLIP model.
    """

    class_names: list[str]
    model: nn.Module

    @abstractmethod
    def present_text(self) -> Tensor:
        """Return the text features ``[K, D]`` at the present weights of the model.

        The features have unit length and no graph.
        """

    @abstractmethod
    def using_text(self, features: Tensor) -> AbstractContextManager[None]:
        """Context manager in which the classifier uses these text features ``[K, D]``."""

    def text_is_current(self, *, quick: bool = False) -> bool:
        """Return whether the text features can belong to the present weights of the model.

        Args:
            quick: see :meth:`openvclip.models.text_weights.TextMark.differs`.
        """
        return True


def text_classifiers(module: nn.Module) -> list[TextClassifier]:
    """Return the text classifiers in a module, the module itself included."""
    return [part for part in module.modules() if isinstance(part, TextClassifier)]


def warn_of_other_text(module: nn.Module, *, quick: bool = False) -> None:
    """Warn if text features in a module belong to other weights than the model has now.

    Args:
        module: a classifier, or a module that holds some.
        quick: see :meth:`openvclip.models.text_weights.TextMark.differs`.

    Warns:
        TextFeaturesWarning: text weights changed after the class names were encoded.
    """
    if not all(part.text_is_current(quick=quick) for part in text_classifiers(module)):
        warnings.warn(
            "The text weights of the model changed after the class names were encoded, so the text "
            "features belong to other weights. Call classifier.refresh_text(), or create the "
            "classifier after the weights are loaded.",
            TextFeaturesWarning,
            stacklevel=3,
        )


class ZeroShotClassifier(TextClassifier):
    """A classifier that compares images or videos with the text features of class names.

    The text features are computed once, when the classifier is created, without gradients, from
    the weights that ``model`` has then. For each class, the feature of each template is
    L2-normalised, the features are averaged over the templates, and the mean is L2-normalised.

    The text features stay if the weights of ``model`` change later. If the text tower is trained,
    call :meth:`refresh_text` afterwards. :func:`openvclip.evaluation.sweep` does this for each
    interpolation; ``evaluate`` and ``predict`` warn about features of other weights.

    Args:
        model: an open_clip model, or a model of transformers such as ``CLIPModel`` or
            ``SiglipModel``. The model becomes a submodule, so gradients reach the model.
        tokenizer: a function from a list of texts to token ids, such as the result of
            ``open_clip.get_tokenizer``; or a tokenizer or processor of transformers, see
            :func:`openvclip.models.as_tokenizer`.
        class_names: K different class names.
        templates: strings in which the class name replaces ``{}``, or functions from a class name
            to a text.
        batch_size: number of texts to encode at a time.
        text_features: the result of :func:`class_features` for the same arguments, if it was
            computed before. Default: it is computed.
        pooling: how the features of the frames become one feature, see
            :func:`openvclip.encode_video`. ``"frames"`` for ViFi-CLIP.

    Attributes:
        pooling: as the argument.
        text_features: ``[K, D]``, unit length. A buffer that is not part of the state dict.
        own_text: whether the classifier computed the text features. False if they were given.

    Raises:
        ClassNamesError: ``class_names`` is empty, or holds an empty or repeated name; or
            ``templates`` is empty, or holds a template without ``{}``.
        UnsupportedModelError: the model is neither a CLIP of open_clip nor a CLIP of transformers.
        NonFiniteWeightsError: the text features are not finite. The error names the entries of the
            model that are not finite.
        UsageError: ``pooling`` is unknown.

    Warns:
        LabelWarning: the text tower can't tell some class names apart.
    """

    text_features: Tensor

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        class_names: Sequence[str],
        templates: Sequence[Template] = VIDEO_TEMPLATES,
        *,
        batch_size: int = 256,
        text_features: Tensor | None = None,
        pooling: Pooling = "unit_frames",
    ) -> None:
        super().__init__()
        require_clip(model)
        require_pooling(pooling)
        self.class_names = require_names(class_names)
        self.model = model
        self.pooling: Pooling = pooling
        tokenize = as_tokenizer(tokenizer, model)
        self._texts = _ClassTexts(tokenize, self.class_names, templates, batch_size)
        self.own_text = text_features is None
        features = self._texts.features(model) if text_features is None else text_features
        warn_of_equal_labels(self.class_names, features)
        self.register_buffer("text_features", features, persistent=False)
        self._mark = TextMark(model)

    def forward(self, video: Tensor) -> Tensor:
        """Return the logits of videos: the logit scale times the mean cosine over the frames.

        If the model has a ``logit_bias`` (SigLIP), the bias is added. With
        ``pooling="frames"``, the cosine is that of the mean frame.

        Args:
            video: clips ``[B, T, C, H, W]``, or images ``[B, C, H, W]``. For images the logits are
                those of plain CLIP, also if the model is expanded. So one clip needs its batch
                axis: a tensor ``[T, C, H, W]`` is read as T images.

        Returns:
            Logits ``[B, K]``.

        Raises:
            VideoShapeError: ``video`` has a wrong rank, dtype, number of channels or frame size,
                or no frames.
        """
        features = video_features(self.model, video, self.pooling)
        return similarity_logits(self.model, features, self.text_features)

    def refresh_text(self) -> None:
        """Compute the text features again, from the present weights of the model."""
        self.text_features = self._texts.features(self.model)
        self.own_text = True
        self._mark = TextMark(self.model)

    def text_is_current(self, *, quick: bool = False) -> bool:
        """Return whether the text features can belong to the present weights of the model.

        Args:
            quick: see :meth:`openvclip.models.text_weights.TextMark.differs`.
        """
        return not self._mark.differs(self.model, quick=quick)

    def present_text(self) -> Tensor:
        """Return the text features ``[K, D]`` at the present weights of the model.

        They are encoded only if the text weights changed since they were encoded last.
        """
        fits = self._mark.fits(self.model)
        return self.text_features if fits else self._texts.features(self.model)

    @contextmanager
    def using_text(self, features: Tensor) -> Iterator[None]:
        """Context manager in which the classifier uses these text features ``[K, D]``."""
        before = self.text_features
        self.text_features = features
        try:
            yield
        finally:
            self.text_features = before


def class_features(
    model: nn.Module,
    tokenizer: Tokenizer,
    class_names: Sequence[str],
    templates: Sequence[Template] = VIDEO_TEMPLATES,
    *,
    batch_size: int = 256,
) -> Tensor:
    """Return the text features of class names at the present weights of a model.

    For each class, the feature of each template is L2-normalised, the features are averaged over
    the templates, and the mean is L2-normalised. All text features of openvclip that are not
    learned prompts come from this computation.

    Args:
        model: see :class:`ZeroShotClassifier`.
        tokenizer: see :class:`ZeroShotClassifier`.
        class_names: K different class names.
        templates: see :class:`ZeroShotClassifier`.
        batch_size: number of texts to encode at a time.

    Returns:
        Tensor ``[K, D]`` on the device of the model, without a graph.

    Raises:
        ClassNamesError, UnsupportedModelError, NonFiniteWeightsError: see
            :class:`ZeroShotClassifier`.
    """
    require_clip(model)
    names = require_names(class_names)
    tokenize = as_tokenizer(tokenizer, model)
    return _ClassTexts(tokenize, names, templates, batch_size).features(model)


class _ClassTexts:
    """The token ids of the texts of class names, in batches on the CPU."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        class_names: list[str],
        templates: Sequence[Template],
        batch_size: int,
    ) -> None:
        templates = require_templates(templates)
        texts = [fill_template(form, name) for name in class_names for form in templates]
        self._n_classes = len(class_names)
        starts = range(0, len(texts), batch_size)
        self._tokens = [tokens_of(tokenizer, texts[i : i + batch_size]) for i in starts]

    @torch.no_grad()
    def features(self, model: nn.Module) -> Tensor:
        """Return the text features ``[K, D]`` at the present weights.

        For more than four batches, a progress bar is shown in a terminal. Within
        :func:`openvclip.models.text_cache.text_cache`, the features are kept on the disk.
        """
        return cached_features(model, self._tokens, lambda: self._encoded(model))

    def _encoded(self, model: nn.Module) -> Tensor:
        encoded = encode_texts(model, self._tokens)
        mean = encoded.unflatten(0, (self._n_classes, -1)).mean(dim=1)
        return functional.normalize(mean, dim=-1)


@torch.no_grad()
def encode_texts(model: nn.Module, tokens: Sequence[Tensor]) -> Tensor:
    """Return the features ``[n, D]`` of texts with unit length, in eval mode.

    For more than four batches, a progress bar is shown in a terminal.

    Args:
        model: a CLIP model of open_clip or transformers.
        tokens: token ids of the texts, in batches.

    Raises:
        NonFiniteWeightsError, EvaluationError: the features are not finite.
        UsageError: weights are on the meta device.
    """
    require_values(model)
    hidden = None if len(tokens) > 4 else True
    with evaluation_mode(model):
        encoded = [
            functional.normalize(encode_text(model, batch), dim=-1)
            for batch in progress_bar(tokens, desc="text features", disable=hidden)
        ]
    features = torch.cat(encoded)
    require_finite(features, lambda: text_state(model), "The text features")
    return features


def require_names(class_names: Sequence[str], argument: str = "class_names") -> list[str]:
    """Check class names and return them as a list.

    Args:
        class_names: the class names.
        argument: what the caller's argument is called, for the error.

    Raises:
        ClassNamesError: ``class_names`` is one string, is empty, or holds an empty or repeated
            name.
    """
    kind = "class names" if argument == "class_names" else argument
    if isinstance(class_names, (str, bytes)):
        raise ClassNamesError(f"{argument} is one string, {class_names!r}; expected a list.")
    if not isinstance(class_names, Iterable):
        raise ClassNamesError(f"{argument} is {class_names!r}; expected a list of names.")
    names = list(class_names)
    if not names:
        raise ClassNamesError(f"{argument} is empty; expected at least one name.")
    invalid = [i for i, name in enumerate(names) if not (isinstance(name, str) and name.strip())]
    if invalid:
        raise ClassNamesError(
            f"{argument}[{invalid[0]}] is {names[invalid[0]]!r}; expected a non-empty string. "
            f"Number of invalid {kind}: {len(invalid)}."
        )
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        raise ClassNamesError(
            f"{kind.capitalize()} occur more than once: {', '.join(map(repr, repeated[:5]))}"
            f"{', ...' if len(repeated) > 5 else ''}. Give each class a different name."
        )
    return names


def require_templates(templates: Sequence[Template]) -> tuple[Template, ...]:
    """Check templates and return them as a tuple.

    Raises:
        ClassNamesError: ``templates`` is one string, is empty, or holds something else than
            functions and strings with ``{}``.
    """
    if isinstance(templates, (str, bytes)):
        raise ClassNamesError(f"templates is one string, {templates!r}; expected a list.")
    if not isinstance(templates, Iterable):
        raise ClassNamesError(f"templates is {templates!r}; expected a list of texts with {{}}.")
    forms = tuple(templates)
    if not forms:
        raise ClassNamesError("templates is empty; expected at least one template, such as '{}'.")
    for form in forms:
        if not isinstance(form, str) and not callable(form):
            raise ClassNamesError(
                f"templates holds {form!r}; expected a text with {{}}, or a function from a class "
                "name to a text."
            )
        if isinstance(form, str) and "{}" not in form:
            raise ClassNamesError(f"Template {form!r} has no {{}} for the class name.")
    return forms


def fill_template(template: Template, name: str) -> str:
    """Return the text of a class name in a template.

    Args:
        template: a string in which the class name replaces ``{}``, or a function from a class
            name to a text.
        name: the class name.

    Raises:
        ClassNamesError: the string has no ``{}``, or the function returns no text.
    """
    if callable(template):
        text: object = template(name)
        if not isinstance(text, str):
            raise ClassNamesError(
                f"Template {template!r} returned {text!r} for {name!r}; expected a text."
            )
        return text
    if "{}" not in template:
        raise ClassNamesError(f"Template {template!r} has no {{}} for the class name.")
    return template.replace("{}", name)
