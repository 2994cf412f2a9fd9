"""Zero-shot classification of videos: templates and the classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from openvclip.errors import ClassNamesError, UnsupportedModelError
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
"""The 28 templates of the released code, ``{}`` for the class name."""


class ZeroShotClassifier(nn.Module):
    """A CLIP and a list of class names as a classifier of videos.

    The text features are made once, here, without gradients: each template's feature is
    L2-normalised, their mean over the templates is normalised again. Make the classifier while
    the model holds the original CLIP's text tower (fine-tuning leaves it frozen).

    Args:
        model: an open_clip model with ``encode_image``, ``encode_text`` and ``logit_scale``;
            kept as a submodule, so that gradients reach it.
        tokenizer: turns a list of texts into token ids, as ``open_clip.get_tokenizer`` gives it.
        class_names: K names, no two alike.
        templates: strings with ``{}`` for the class name, or functions from name to text.
        batch_size: texts encoded at a time.

    Attributes:
        text_features: ``[K, D]``, unit length; a buffer that is not part of the state dict.

    Raises:
        ClassNamesError: no names, empty or duplicate ones, or a template without ``{}``.
        UnsupportedModelError: the model lacks one of the three members.
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
            raise ClassNamesError("templates is empty; expected at least one, such as '{}'.")
        features = _encode_texts(model, tokenizer, texts, batch_size)
        mean = features.unflatten(0, (len(self.class_names), -1)).mean(dim=1)
        self.register_buffer("text_features", functional.normalize(mean, dim=-1), persistent=False)

    def forward(self, video: Tensor) -> Tensor:
        """Logits ``[B, K]`` of clips ``[B, T, C, H, W]``: scale times the mean frame cosine.

        Raises:
            VideoShapeError: wrong rank, dtype, channels, frame size, or no frames.
        """
        pooled = encode_video(self.model, video)
        scale = cast(Any, self.model).logit_scale.exp()
        logits: Tensor = scale * pooled @ self.text_features.to(pooled.dtype).T
        return logits


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` for a block; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def require_clip(model: nn.Module) -> None:
    """Raise :class:`UnsupportedModelError` unless ``model`` has what a classifier needs."""
    lacking = [n for n in ("encode_image", "encode_text", "logit_scale") if not hasattr(model, n)]
    if lacking:
        raise UnsupportedModelError(
            f"{type(model).__name__} lacks {', '.join(lacking)}; expected an open_clip model. "
            "Pass the model itself, not a wrapper around it."
        )


def require_names(class_names: Sequence[str]) -> list[str]:
    """The names as a list, or :class:`ClassNamesError`: none, empty or duplicate ones."""
    if isinstance(class_names, str):
        raise ClassNamesError(f"class_names is one string, {class_names!r}; expected a list.")
    names = list(class_names)
    if not names:
        raise ClassNamesError("class_names is empty; expected at least one name.")
    strange = [i for i, name in enumerate(names) if not (isinstance(name, str) and name.strip())]
    if strange:
        raise ClassNamesError(
            f"class_names[{strange[0]}] is {names[strange[0]]!r}; expected text "
            f"({len(strange)} such entries)."
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ClassNamesError(
            f"Class names occur more than once: {', '.join(map(repr, twice[:5]))}"
            f"{', ...' if len(twice) > 5 else ''}. Videos of such classes could not be told apart."
        )
    return names


def fill_template(template: str | Callable[[str], str], name: str) -> str:
    """The text of a class; :class:`ClassNamesError` where a template has no ``{}``."""
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
    """Normalised features ``[len(texts), D]``; a progress bar where it takes several batches."""
    from tqdm import tqdm  # comes with open_clip

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
