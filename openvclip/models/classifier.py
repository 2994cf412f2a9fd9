"""Zero-shot classification of videos: text templates and :class:`ZeroShotClassifier`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import ClassNamesError, UnsupportedModelError
from openvclip.models.modes import evaluation_mode as evaluation_mode
from openvclip.towers.temporal import encode_video

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


class ZeroShotClassifier(nn.Module):
    """A video classifier that compares videos with the text features of class names.

    The text features are computed once, when the classifier is created, without gradients. For
    each class, the feature of each template is L2-normalised, the features are averaged over the
    templates, and the mean is L2-normalised. Create the classifier while ``model`` holds the text
    tower of the original CLIP. (Fine-tuning leaves the text tower frozen.)

    Args:
        model: an open_clip model with ``encode_image``, ``encode_text`` and ``logit_scale``. The
            model becomes a submodule, so gradients reach the model.
        tokenizer: a function from a list of texts to token ids, such as the result of
            ``open_clip.get_tokenizer``.
        class_names: K different class names.
        templates: strings in which the class name replaces ``{}``, or functions from a class name
            to a text.
        batch_size: number of texts to encode at a time.

    Attributes:
        text_features: ``[K, D]``, unit length. A buffer that is not part of the state dict.

    Raises:
        ClassNamesError: ``class_names`` is empty, or holds an empty or repeated name; or
            ``templates`` is empty, or holds a template without ``{}``.
        UnsupportedModelError: the model lacks ``encode_image``, ``encode_text`` or
            ``logit_scale``.
    """

    text_features: Tensor

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Callable[[list[str]], Tensor],
        class_names: Sequence[str],
        templates: Sequence[str | Callable[[str], str]] = VIDEO_TEMPLATES,
        *,
        batch_size: int = 256,
    ) -> None:
        super().__init__()
        require_clip(model)
        self.class_names = require_names(class_names)
        self.model = model
        if isinstance(templates, str):
            raise ClassNamesError(f"templates is one string, {templates!r}; expected a list.")
        texts = [fill_template(form, name) for name in self.class_names for form in templates]
        if not texts:
            raise ClassNamesError(
                "templates is empty; expected at least one template, such as '{}'."
            )
        features = _encode_texts(model, tokenizer, texts, batch_size)
        mean = features.unflatten(0, (len(self.class_names), -1)).mean(dim=1)
        self.register_buffer("text_features", functional.normalize(mean, dim=-1), persistent=False)

    def forward(self, video: Tensor) -> Tensor:
        """Return the logits of videos: the logit scale times the mean cosine over the frames.

        Args:
            video: clips ``[B, T, C, H, W]``.

        Returns:
            Logits ``[B, K]``.

        Raises:
            VideoShapeError: ``video`` has a wrong rank, dtype, number of channels or frame size,
                or no frames.
        """
        pooled = encode_video(self.model, video)
        scale = cast(Any, self.model).logit_scale.exp()
        logits: Tensor = scale * pooled @ self.text_features.to(pooled.dtype).T
        return logits


def require_clip(model: nn.Module) -> None:
    """Check that a model has ``encode_image``, ``encode_text`` and ``logit_scale``.

    Raises:
        UnsupportedModelError: the model lacks one of the three.
    """
    lacking = [n for n in ("encode_image", "encode_text", "logit_scale") if not hasattr(model, n)]
    if lacking:
        raise UnsupportedModelError(
            f"{type(model).__name__} lacks {', '.join(lacking)}; expected an open_clip model. "
            "Pass the model itself, not a wrapper around it."
        )


def require_names(class_names: Sequence[str]) -> list[str]:
    """Check class names and return them as a list.

    Raises:
        ClassNamesError: ``class_names`` is one string, is empty, or holds an empty or repeated
            name.
    """
    if isinstance(class_names, str):
        raise ClassNamesError(f"class_names is one string, {class_names!r}; expected a list.")
    names = list(class_names)
    if not names:
        raise ClassNamesError("class_names is empty; expected at least one name.")
    invalid = [i for i, name in enumerate(names) if not (isinstance(name, str) and name.strip())]
    if invalid:
        raise ClassNamesError(
            f"class_names[{invalid[0]}] is {names[invalid[0]]!r}; expected a non-empty string. "
            f"Number of invalid class names: {len(invalid)}."
        )
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ClassNamesError(
            f"Class names occur more than once: {', '.join(map(repr, repeated[:5]))}"
            f"{', ...' if len(repeated) > 5 else ''}. Give each class a different name."
        )
    return names


def fill_template(template: str | Callable[[str], str], name: str) -> str:
    """Return the text of a class name in a template.

    Args:
        template: a string in which the class name replaces ``{}``, or a function from a class
            name to a text.
        name: the class name.

    Raises:
        ClassNamesError: the string has no ``{}``.
    """
    if callable(template):
        return template(name)
    if "{}" not in template:
        raise ClassNamesError(f"Template {template!r} has no {{}} for the class name.")
    return template.replace("{}", name)


@torch.no_grad()
def _encode_texts(
    model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    texts: list[str],
    batch_size: int,
) -> Tensor:
    """Return the L2-normalised features ``[len(texts), D]`` of texts.

    For more than four batches, a progress bar is shown in a terminal.
    """
    from tqdm import tqdm

    clip = cast(Any, model)
    device = clip.logit_scale.device
    with evaluation_mode(model):
        starts = range(0, len(texts), batch_size)
        bar = tqdm(starts, desc="text features", disable=None if len(starts) > 4 else True)
        features = [
            functional.normalize(
                clip.encode_text(tokenizer(texts[i : i + batch_size]).to(device)), dim=-1
            )
            for i in bar
        ]
    return torch.cat(features)
