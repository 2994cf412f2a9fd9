"""Compute the probabilities of labels for a video file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openvclip.checkpoints.sizes import CLIP_VOCABULARY
from openvclip.errors import UsageError
from openvclip.models.classifier import (
    VIDEO_TEMPLATES,
    Template,
    TextClassifier,
    ZeroShotClassifier,
    warn_of_other_text,
)
from openvclip.models.features import is_transformers, require_clip
from openvclip.models.finite import require_finite
from openvclip.models.labels import warn_of_single_label
from openvclip.models.modes import evaluation_mode
from openvclip.models.preprocess import transform_for
from openvclip.models.reading import read_input, require_source
from openvclip.models.tokenizers import Tokenizer, tokenizer_of_folder
from openvclip.video.sampling import PAPER_SAMPLING, Sampling
from openvclip.video.sources import VideoSource, source_name
from openvclip.video.transforms import Transform
from openvclip.weights.names import named_state, unwrap


@dataclass(frozen=True)
class Prediction:
    """The probabilities of the labels for one video.

    Attributes:
        path: the video file, or what the video is, such as ``"<32 frames>"``.
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
    video: VideoSource,
    labels: Sequence[str] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    transform: Transform | None = None,
    templates: Sequence[Template] = VIDEO_TEMPLATES,
    sampling: Sampling = PAPER_SAMPLING,
    fps: float | None = None,
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
        ClassNamesError: ``labels`` is empty, or holds an empty or repeated label.
        UsageError: ``labels`` is given for a classifier with other class names, or is ``None`` for
            another model; or the tokenizer of the model is not known; or ``video`` is a
            list, or a tensor of floats.
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
    classifier = classifier_for(model, labels, tokenizer, templates)
    transform = transform or transform_for(classifier.model)
    views = read_input(video, sampling, transform, fps=fps)
    return prediction_of(source_name(video), classifier, logits_of(classifier, views).mean(dim=0))


def prediction_of(path: str, classifier: TextClassifier, logits: Tensor) -> Prediction:
    """Return the prediction that logits of a classifier give for a video.

    Args:
        path: the name of the video.
        classifier: the classifier.
        logits: logits of the class names, averaged over the views, ``[K]``.
    """
    return Prediction(path, classifier.class_names, logits.softmax(dim=-1).cpu())


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
    return ZeroShotClassifier(model, tokenizer or default_tokenizer(model), labels, templates)


@torch.no_grad()
def logits_of(classifier: TextClassifier, clips: Tensor) -> Tensor:
    """Return the float32 logits ``[B, K]`` of clips ``[B, T, C, H, W]`` in eval mode.

    Raises:
        NonFiniteWeightsError, EvaluationError: see :func:`openvclip.predict`.
    """
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
