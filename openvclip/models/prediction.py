"""What is in a video: one call from a file to labels with probabilities."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openvclip.errors import UsageError
from openvclip.models.classifier import VIDEO_TEMPLATES, ZeroShotClassifier, evaluation_mode
from openvclip.models.preprocess import transform_for
from openvclip.video.decoding import read_clip
from openvclip.video.sampling import PAPER_SAMPLING, Sampling
from openvclip.video.transforms import Transform

_CLIP_VOCABULARY = 49408


@dataclass(frozen=True)
class Prediction:
    """What a model says of a video.

    Attributes:
        path: the file.
        labels: the K labels it was asked about.
        probabilities: float32 ``[K]``, sum 1.
    """

    path: str
    labels: list[str]
    probabilities: Tensor

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` most probable labels (all of them if there are fewer), the best first."""
        values, places = self.probabilities.topk(min(k, len(self.labels)))
        return list(zip([self.labels[i] for i in places.tolist()], values.tolist(), strict=True))

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
    """Which of some labels fits a video best.

    For many videos make a :class:`ZeroShotClassifier` once and pass it as ``model``: the labels'
    text features are then not made again.

    Args:
        model: an open_clip model, expanded or not; or a :class:`ZeroShotClassifier`, whose class
            names are the labels.
        video: a file.
        labels: K labels, no two alike; ``None`` with a :class:`ZeroShotClassifier`.
        tokenizer: of the model's text tower; CLIP's own by default, for models with its
            vocabulary.
        transform: from 8-bit frames to what the model takes; by default CLIP's pixels at the
            model's size, as the released evaluation makes them.
        templates: texts with ``{}`` for the label.
        sampling: which frames of the video to read; by default the paper's 3 views of 8 frames.

    Returns:
        The probabilities: the softmax of the mean of the views' logits. (An evaluation sums the
        logits, which ranks the labels alike; their sum would make every answer look certain.)

    Raises:
        VideoError, VideoOptionError: the file can't be read, or not in this way.
        ClassNamesError: no labels, blank or duplicate ones.
        UsageError: labels for a classifier that has its own, or none for a model; a model whose
            tokenizer is not known.
        UnsupportedModelError: ``model`` is no open_clip model.
    """
    classifier = classifier_for(model, labels, tokenizer, templates)
    transform = transform or transform_for(classifier.model)
    clips = read_clip(video, **vars(sampling))
    device = classifier.text_features.device
    pixels = transform(clips).flatten(0, -5)  # crops of a view are views
    logits = logits_of(classifier, pixels.to(device)).mean(dim=0)
    return Prediction(os.fspath(video), classifier.class_names, logits.softmax(dim=-1).cpu())


def classifier_for(
    model: nn.Module,
    labels: Sequence[str] | None,
    tokenizer: Callable[[list[str]], Tensor] | None,
    templates: Sequence[str],
) -> ZeroShotClassifier:
    """``model`` itself where it is a classifier; else one for the labels."""
    if isinstance(model, ZeroShotClassifier):
        if labels is not None and list(labels) != model.class_names:
            raise UsageError("The classifier has labels of its own: leave labels out.")
        return model
    if labels is None:
        raise UsageError("labels is None: say between which labels to choose.")
    return ZeroShotClassifier(model, tokenizer or _clip_tokenizer(model), labels, templates)


@torch.no_grad()
def logits_of(classifier: ZeroShotClassifier, clips: Tensor) -> Tensor:
    """float32 ``[B, K]`` of clips ``[B, T, C, H, W]``, in eval mode."""
    with evaluation_mode(classifier):
        logits: Tensor = classifier(clips.to(next(classifier.parameters()).dtype))
    return logits.float()


def _clip_tokenizer(model: nn.Module) -> Callable[[list[str]], Tensor]:
    import open_clip

    text = getattr(model, "text", model)
    words, length = getattr(text, "vocab_size", None), getattr(text, "context_length", None)
    if words != _CLIP_VOCABULARY or length is None:
        raise UsageError(
            f"{type(model).__name__} has a vocabulary of {words} tokens, which is not CLIP's of "
            f"{_CLIP_VOCABULARY}: give tokenizer=open_clip.get_tokenizer(name)."
        )
    tokenizer: Callable[[list[str]], Tensor] = open_clip.SimpleTokenizer(context_length=length)
    return tokenizer
