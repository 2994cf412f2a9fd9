"""Compute the probabilities of labels for a video file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.checkpoints.contract import Confidence
from openvclip.checkpoints.sizes import CLIP_VOCABULARY
from openvclip.errors import UsageError
from openvclip.models.background import background_texts, divide, with_background
from openvclip.models.classifier import (
    VIDEO_TEMPLATES,
    Template,
    TextClassifier,
    ZeroShotClassifier,
    require_names,
    warn_of_other_text,
)
from openvclip.models.confidence import confidence_score, effective_confidence
from openvclip.models.features import cosines_of_logits, is_transformers, require_clip
from openvclip.models.finite import require_finite, require_values
from openvclip.models.labels import warn_of_single_label
from openvclip.models.modes import evaluation_mode
from openvclip.models.preprocess import transform_for
from openvclip.models.reading import read_input, require_source
from openvclip.models.tokenizers import Tokenizer, tokenizer_of_folder
from openvclip.video.sampling import PAPER_SAMPLING, Sampling
from openvclip.video.sources import VideoSource, source_name
from openvclip.video.transforms import Transform
from openvclip.weights.names import named_state, unwrap

NONE_OF_THESE = "none of these"
"""The line in front of the labels of a video that is rejected."""


@dataclass(frozen=True)
class Prediction:
    """The probabilities of the labels for one video.

    Attributes:
        path: the video file, or what the video is, such as ``"<32 frames>"``.
        labels: the K labels.
        probabilities: float32 ``[K]``. The sum is 1, less the probabilities of ``background``.
        cosines: cosine of the video and the text of each label, float32 ``[K]``. For a
            classifier that averages cosines over frames, it is the mean over frames and views.
        logits: logits of the labels, then of the background texts, before the division by the
            temperature, float32 ``[K + B]``.
        background: the probability of each background text.
        score: the number that is compared with the threshold; see
            :func:`openvclip.models.confidence_score`.
        rejected: whether the video is none of the labels: ``score`` is below the threshold, or a
            background text is more probable than every label. ``label`` and ``top`` still give the
            most probable labels.
    """

    path: str
    labels: list[str]
    probabilities: Tensor
    cosines: Tensor | None = None
    logits: Tensor | None = None
    background: dict[str, float] = field(default_factory=dict)
    score: float | None = None
    rejected: bool = False

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Return the ``k`` most probable labels with their probabilities, in descending order.

        If there are fewer than ``k`` labels, all labels are returned.
        """
        values, indices = self.probabilities.topk(min(k, len(self.labels)))
        return list(zip([self.labels[i] for i in indices.tolist()], values.tolist(), strict=True))

    @property
    def label(self) -> str:
        """The most probable label, also if the video is rejected."""
        return self.top(1)[0][0]

    @property
    def answer(self) -> str | None:
        """The most probable label, or ``None`` if the video is rejected."""
        return None if self.rejected else self.label

    def text(self, k: int = 5) -> str:
        """Return the path, ``none of these`` if the video is rejected, and the ``k`` best labels.

        Each is on its own line.
        """
        rejection = [NONE_OF_THESE] if self.rejected else []
        rows = [f"{probability:6.1%}  {label}" for label, probability in self.top(k)]
        return "\n".join([self.path, *rejection, *rows])

    def as_json(self, k: int = 5) -> dict[str, Any]:
        """Return the path, the ``k`` best labels, the background and the rejection for JSON."""
        order = self.probabilities.topk(min(k, len(self.labels))).indices.tolist()
        entries = []
        for index in order:
            entry = {"label": self.labels[index], "probability": float(self.probabilities[index])}
            if self.cosines is not None:
                entry["cosine"] = float(self.cosines[index])
            entries.append(entry)
        background = [
            {"label": text, "probability": value} for text, value in self.background.items()
        ]
        rejection = {"rejected": self.rejected, "score": self.score}
        return {"path": self.path, "labels": entries, "background": background, **rejection}

    def __str__(self) -> str:
        return self.text()


def predict(
    model: nn.Module,
    video: VideoSource,
    labels: Sequence[str] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    transform: Transform | None = None,
    templates: Sequence[Template] = VIDEO_TEMPLATES,
    sampling: Sampling = PAPER_SAMPLING,
    fps: float | None = None,
    background: Sequence[str] = (),
    confidence: Confidence | None = None,
    reject: bool | float | None = None,
) -> Prediction:
    """Compute the probabilities of labels for a video or an image.

    The text features of the labels are those of ``model`` itself, also if its text tower is
    fine-tuned. To predict many videos, create a :class:`ZeroShotClassifier` and pass it as
    ``model``. The text features of the labels are then computed once.

    Args:
        model: an open_clip model, or a model of transformers such as ``CLIPModel`` or
            ``SiglipModel``, expanded or not; or a classifier (:class:`ZeroShotClassifier`,
            :class:`openvclip.prompting.VideoClassifier`), whose class names are the labels.
        video: the path of a video file; or a URL, bytes, a file object, an array of frames or an
            open decoder, see :data:`openvclip.video.VideoSource`. An image is predicted as by plain
            CLIP: a file with the extension of an image format (``.jpg``, ``.png``), its bytes, an
            image of Pillow, or uint8 ``[H, W, C]`` or ``[C, H, W]``.
        labels: K different labels. ``None`` if ``model`` is a classifier.
        tokenizer: see :class:`ZeroShotClassifier`. Default: the tokenizer of the original CLIP, if
            the model has the vocabulary of the original CLIP. For a model of transformers: the
            tokenizer in the folder or repository that the model was loaded from.
        transform: a transform from 8-bit frames to the input of the model. Default: the transform
            of the released evaluation, at the image size of the model.
        templates: strings in which the label replaces ``{}``, or functions from a label to a text.
        sampling: the frames to read. Default: the 3 views of 8 frames of the paper.
        fps: frames per second, if ``video`` is an array of frames.
        background: texts of what else a video can show, such as ``"an empty room"``. They share the
            probability with the labels, but they are never the answer. Templates are filled with
            them as with labels. If ``model`` is a classifier, they are some of its class names.
        confidence: the result of :func:`openvclip.models.calibrate`: the temperature, and the
            threshold with its score. Default: the temperature 1 and no threshold.
        reject: which videos are rejected as none of the labels. ``None``: those below the threshold
            of ``confidence``, and those of which a background text is more probable than every
            label. ``True``: the same, and ``confidence`` must have a threshold. A number: the same
            with this threshold. ``False``: none.

    Returns:
        The labels and their probabilities. The logits are averaged over the views, and the
        probabilities are the softmax of the averaged logits. (An evaluation sums the logits over
        the views. The order of the labels is the same, but the sum would make every probability
        close to 0 or 1.)

    Raises:
        VideoError: the video can't be read.
        VideoOptionError: the video can't be read with this ``sampling``, or ``fps`` is missing for
            an array of frames.
        VideoShapeError: the frames of an array are not uint8, or have another shape.
        ClassNamesError: ``labels`` is empty, or ``labels`` or ``background`` hold an empty or
            repeated text.
        UsageError: ``labels`` is given for a classifier with other class names, or is ``None`` for
            another model; or the tokenizer of the model is not known; or ``video`` is a
            list, or a tensor of floats; or ``reject`` is ``True`` without a calibrated threshold,
            or is a number that the score can't have.
        UnsupportedModelError: ``model`` is neither a CLIP of open_clip nor of transformers.
        ModelNameError: the tokenizer of a model of transformers can't be loaded.
        NonFiniteWeightsError: the logits are NaN or infinite, because weights are. The error names
            the entries.
        EvaluationError: the logits are NaN or infinite, and all weights are finite.

    Warns:
        LabelWarning: the text tower can't tell some labels apart, or there is only one label.
        TextFeaturesWarning: the text weights of the model changed after the classifier was created.
    """
    require_source(video)
    effective_confidence(confidence, reject)  # a wrong value is an error before the video is read
    background = background_texts(background)
    names = None if labels is None else with_background(labels, background)
    classifier = classifier_for(model, names, tokenizer, templates)
    divide(classifier.class_names, background)
    transform = transform or transform_for(classifier.model)
    views = read_input(video, sampling, transform, fps=fps)
    logits = logits_of(classifier, views).mean(dim=0)
    return prediction_of(
        source_name(video), classifier, logits, background, confidence=confidence, reject=reject
    )


def prediction_of(
    path: str,
    classifier: TextClassifier,
    logits: Tensor,
    background: Sequence[str] = (),
    *,
    confidence: Confidence | None = None,
    reject: bool | float | None = None,
) -> Prediction:
    """Return the prediction that logits of a classifier give for a video.

    Args:
        path: the name of the video.
        classifier: the classifier. Its class names are the labels and the background texts.
        logits: logits of the class names, averaged over the views, ``[K + B]``.
        background: see :func:`openvclip.predict`.
        confidence: see :func:`openvclip.predict`.
        reject: see :func:`openvclip.predict`.

    Raises:
        ClassNamesError, UsageError: see :func:`openvclip.predict`.
    """
    settings, score = effective_confidence(confidence, reject)
    labels, others = divide(classifier.class_names, background)
    logits = logits[[*labels, *others]].float().cpu()
    probabilities = (logits / settings.temperature).softmax(dim=-1)
    of_labels, of_others = probabilities[: len(labels)], probabilities[len(labels) :]
    cosines = cosines_of_logits(classifier.model, logits[: len(labels)])
    value = float(confidence_score(score, cosines, logits / settings.temperature))
    low = settings.threshold is not None and value < settings.threshold
    beaten = bool(others) and bool(of_others.max() > of_labels.max())
    names = classifier.class_names
    return Prediction(
        path,
        [names[index] for index in labels],
        of_labels,
        cosines=cosines,
        logits=logits,
        background=dict(zip([names[i] for i in others], of_others.tolist(), strict=True)),
        score=value,
        rejected=reject is not False and (low or beaten),
    )


def classifier_for(
    model: nn.Module,
    labels: Sequence[str] | None,
    tokenizer: Tokenizer | None,
    templates: Sequence[Template],
) -> TextClassifier:
    """Return ``model`` if it is a classifier, or create a classifier of the labels.

    Data parallelism around ``model`` is removed.

    Args:
        model: see :func:`openvclip.predict`.
        labels: see :func:`openvclip.predict`.
        tokenizer: see :func:`openvclip.predict`.
        templates: see :func:`openvclip.predict`.

    Raises:
        UsageError: ``labels`` is given for a classifier with other class names, or is ``None`` for
            another model; or the tokenizer of the model is not known.
        ClassNamesError: ``labels`` is empty, or holds an empty or repeated label.
        UnsupportedModelError, ModelNameError: see :func:`openvclip.predict`.

    Warns:
        LabelWarning, TextFeaturesWarning: see :func:`openvclip.predict`.
    """
    classifier = _classifier_for(unwrap(model), labels, tokenizer, templates)
    warn_of_single_label(classifier.class_names)
    warn_of_other_text(classifier, quick=True)
    return classifier


def _classifier_for(
    model: nn.Module,
    labels: Sequence[str] | None,
    tokenizer: Tokenizer | None,
    templates: Sequence[Template],
) -> TextClassifier:
    if isinstance(model, TextClassifier):
        if labels is not None and list(labels) != model.class_names:
            raise UsageError(
                f"labels differ from the {len(model.class_names)} class names of the classifier. "
                "Leave labels out, or pass classifier.model."
            )
        return model
    require_clip(model)
    if labels is None:
        raise UsageError("labels is None; expected a list of labels to choose from.")
    names = require_names(labels, "labels")
    return ZeroShotClassifier(model, tokenizer or default_tokenizer(model), names, templates)


@torch.no_grad()
def logits_of(classifier: TextClassifier, clips: Tensor) -> Tensor:
    """Return the float32 logits ``[B, K]`` of clips ``[B, T, C, H, W]`` in eval mode.

    Raises:
        NonFiniteWeightsError, EvaluationError: see :func:`openvclip.predict`.
        UsageError: weights are on the meta device.
    """
    require_values(classifier)
    first = next(classifier.parameters())
    with evaluation_mode(classifier):
        logits: Tensor = classifier(clips.to(first.device, first.dtype))
    require_finite(logits, lambda: named_state(classifier.model), "The logits")
    return logits.float()


def default_tokenizer(model: nn.Module) -> Tokenizer:
    """Return the tokenizer that a model of transformers was loaded with, or the tokenizer of CLIP.

    Raises:
        UsageError: the model is of transformers and was not loaded from a folder, or it has another
            vocabulary than the original CLIP.
    """
    name = getattr(model, "name_or_path", "")
    return tokenizer_of_folder(model, name) if name else _clip_tokenizer(model)


def _clip_tokenizer(model: nn.Module) -> Tokenizer:
    import open_clip

    text_tower = getattr(model, "text", model)
    vocabulary = getattr(text_tower, "vocab_size", None)
    length = getattr(text_tower, "context_length", None)
    if vocabulary is None or length is None:
        raise UsageError(
            f"The tokenizer of {type(model).__name__} is not known. Give tokenizer=, a function "
            "from a list of texts to token ids [n, L]"
            f"{', or a tokenizer of transformers' if is_transformers(model) else ''}."
        )
    if vocabulary != CLIP_VOCABULARY:
        raise UsageError(
            f"{type(model).__name__} has a vocabulary of {vocabulary} tokens; CLIP's tokenizer has "
            f"{CLIP_VOCABULARY}. Give tokenizer=open_clip.get_tokenizer(name)."
        )
    tokenizer: Tokenizer = open_clip.SimpleTokenizer(context_length=length)
    return tokenizer
