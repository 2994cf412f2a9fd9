"""Compute the probabilities of labels for a video file."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openvclip.checkpoints.sizes import CLIP_VOCABULARY
from openvclip.errors import UsageError
from openvclip.models.classifier import VIDEO_TEMPLATES, ZeroShotClassifier, evaluation_mode
from openvclip.models.preprocess import transform_for
from openvclip.video.decoding import read_clip
from openvclip.video.sampling import PAPER_SAMPLING, Sampling
from openvclip.video.transforms import Transform


@dataclass(frozen=True)
class Prediction:
    """The probabilities of the labels for one video.

    Attributes:
        path: the video file.
        labels: the K labels.
        probabilities: float32 ``[K]``, sum 1.
    """

    path: str
    labels: list[str]
    probabilities: Tensor

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Return the ``k`` most probable labels with their probabilities, in descending order.

        If there are fewer than ``k`` labels, all labels are returned.
        """
        values, indices = self.probabilities.topk(min(k, len(self.labels)))
        return list(zip([self.labels[i] for i in indices.tolist()], values.tolist(), strict=True))

    @property
    def label(self) -> str:
        """The most probable label."""
        return self.top(1)[0][0]

    def __str__(self) -> str:
        rows = [f"{probability:6.1%}  {label}" for label, probability in self.top()]
        return "\n".join([self.path, *rows])


def predict(
    model: nn.Module,
    video: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
    *,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
    transform: Transform | None = None,
    templates: Sequence[str] = VIDEO_TEMPLATES,
    sampling: Sampling = PAPER_SAMPLING,
) -> Prediction:
    """Compute the probabilities of labels for a video.

    To predict many videos, create a :class:`ZeroShotClassifier` and pass it as ``model``. The text
    features of the labels are then computed once.

    Args:
        model: an open_clip model, expanded or not; or a :class:`ZeroShotClassifier`, whose class
            names are the labels.
        video: the video file.
        labels: K different labels. ``None`` if ``model`` is a :class:`ZeroShotClassifier`.
        tokenizer: a function from a list of texts to token ids. Default: the tokenizer of the
            original CLIP, if the model has the vocabulary of the original CLIP.
        transform: a transform from 8-bit frames to the input of the model. Default: the transform
            of the released evaluation, at the image size of the model.
        templates: strings in which the label replaces ``{}``.
        sampling: the frames to read. Default: the 3 views of 8 frames of the paper.

    Returns:
        The labels and their probabilities. The logits are averaged over the views, and the
        probabilities are the softmax of the averaged logits. (An evaluation sums the logits over
        the views. The order of the labels is the same, but the sum would make every probability
        close to 0 or 1.)

    Raises:
        VideoError: the video can't be read.
        VideoOptionError: the video can't be read with this ``sampling``.
        ClassNamesError: ``labels`` is empty, or holds an empty or repeated label.
        UsageError: ``labels`` is given for a classifier with other class names, or is ``None`` for
            an open_clip model; or the tokenizer of the model is not known.
        UnsupportedModelError: ``model`` is not an open_clip model.
    """
    classifier = classifier_for(model, labels, tokenizer, templates)
    transform = transform or transform_for(classifier.model)
    clips = read_clip(video, **vars(sampling), transform=transform)
    device = classifier.text_features.device
    views = clips.flatten(0, -5)  # several crops of a view become several views
    logits = logits_of(classifier, views.to(device)).mean(dim=0)
    return Prediction(os.fspath(video), classifier.class_names, logits.softmax(dim=-1).cpu())


def classifier_for(
    model: nn.Module,
    labels: Sequence[str] | None,
    tokenizer: Callable[[list[str]], Tensor] | None,
    templates: Sequence[str],
) -> ZeroShotClassifier:
    """Return ``model`` if it is a classifier, or create a classifier of the labels.

    Args:
        model: see :func:`openvclip.predict`.
        labels: see :func:`openvclip.predict`.
        tokenizer: see :func:`openvclip.predict`.
        templates: see :func:`openvclip.predict`.

    Raises:
        UsageError: ``labels`` is given for a classifier with other class names, or is ``None`` for
            an open_clip model; or the tokenizer of the model is not known.
        ClassNamesError: ``labels`` is empty, or holds an empty or repeated label.
    """
    if isinstance(model, ZeroShotClassifier):
        if labels is not None and list(labels) != model.class_names:
            raise UsageError(
                f"labels differ from the {len(model.class_names)} class names of the classifier. "
                "Leave labels out, or pass classifier.model."
            )
        return model
    if labels is None:
        raise UsageError("labels is None; expected a list of labels to choose from.")
    return ZeroShotClassifier(model, tokenizer or _clip_tokenizer(model), labels, templates)


@torch.no_grad()
def logits_of(classifier: ZeroShotClassifier, clips: Tensor) -> Tensor:
    """Return the float32 logits ``[B, K]`` of clips ``[B, T, C, H, W]`` in eval mode."""
    with evaluation_mode(classifier):
        logits: Tensor = classifier(clips.to(next(classifier.parameters()).dtype))
    return logits.float()


def _clip_tokenizer(model: nn.Module) -> Callable[[list[str]], Tensor]:
    """Return the tokenizer of the original CLIP, or raise if the model has another vocabulary."""
    import open_clip

    text_tower = getattr(model, "text", model)
    vocabulary = getattr(text_tower, "vocab_size", None)
    length = getattr(text_tower, "context_length", None)
    if vocabulary != CLIP_VOCABULARY or length is None:
        raise UsageError(
            f"{type(model).__name__} has a vocabulary of {vocabulary} tokens; CLIP's tokenizer has "
            f"{CLIP_VOCABULARY}. Give tokenizer=open_clip.get_tokenizer(name)."
        )
    tokenizer: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(context_length=length)
    return tokenizer
