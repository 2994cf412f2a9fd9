"""Evaluate a classifier on a data set: predictions and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from openvclip.commands.progress import progress_bar
from openvclip.errors import UsageError, VideoShapeError
from openvclip.models.classifier import warn_of_other_text
from openvclip.models.finite import require_finite
from openvclip.models.modes import evaluation_mode
from openvclip.video import PaddedSamples, VideoSample
from openvclip.weights.names import named_state
from openvclip.weights.numerics import compute_dtype

NO_RANK = torch.iinfo(torch.int64).max
"""The rank of a clip without a prediction: the clip could not be read, or a logit is NaN."""


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a classifier on N clips of K classes.

    Attributes:
        predictions: index of the class with the highest logit, int64 ``[N]``. -1 for a clip without
            a prediction.
        targets: index of the true class, int64 ``[N]``.
        ranks: rank of the true class among the logits, int64 ``[N]``. 0 if the true class has the
            highest logit. Ties count against the classifier. A clip without a prediction has
            :data:`NO_RANK`, which is wrong for every ``k``.
    """

    predictions: Tensor
    targets: Tensor
    ranks: Tensor

    @property
    def n_clips(self) -> int:
        """Number of clips N."""
        return self.targets.numel()

    @property
    def top1(self) -> float:
        """Fraction of clips whose true class has the highest logit, in [0, 1]."""
        return self.top(1)

    def top(self, k: int) -> float:
        """Return the fraction of clips with the true class among the ``k`` highest logits.

        The fraction is in [0, 1]. Without clips it is NaN.
        """
        return float((self.ranks < k).double().mean()) if self.n_clips else float("nan")

    def per_class(self, n_classes: int) -> Tensor:
        """Return the top-1 accuracy of each of ``n_classes`` classes, float64 ``[K]``.

        A class without clips has the accuracy NaN.
        """
        correct = torch.bincount(self.targets[self.ranks == 0], minlength=n_classes)
        return correct.double() / torch.bincount(self.targets, minlength=n_classes)

    def confusion(self, n_classes: int) -> Tensor:
        """Return the confusion matrix of ``n_classes`` classes, int64 ``[K, K]``.

        Entry ``[i, j]`` is the number of clips of class ``i`` that are predicted as class ``j``.
        Clips without a prediction are not counted.
        """
        predicted = self.predictions >= 0
        cells = self.targets[predicted] * n_classes + self.predictions[predicted]
        return torch.bincount(cells, minlength=n_classes**2).view(n_classes, n_classes)


def evaluate(
    classifier: nn.Module,
    loader: Iterable[Sequence[Any]],
    *,
    progress: bool | None = None,
    description: str = "evaluate",
) -> Evaluation:
    """Run a classifier over a data set in eval mode and without gradients.

    Args:
        classifier: returns logits ``[B, K]`` for clips ``[B, T, C, H, W]`` or images
            ``[B, C, H, W]``. Videos are moved to the device of the classifier.
        loader: yields batches ``(video, label)``, or batches of
            :class:`openvclip.video.VideoSample`. A video batch is ``[B, T, C, H, W]``, or
            ``[B, V, T, C, H, W]`` with V views of each clip. The logits of the views are summed, as
            in the paper. A batch of 4 dimensions holds images ``[B, C, H, W]``, so one clip needs
            its batch axis. ``label`` is the class index, int64 ``[B]``. Clips of a ``VideoSample``
            that could not be read count as wrong. The clips of a batch have equal lengths: padded
            clips are refused.
        progress: whether to show a progress bar. Default: only in a terminal.
        description: text in front of the progress bar.

    Raises:
        UsageError: the loader returns something else than ``(video, label)``.
        VideoShapeError: a video batch does not have 4 to 6 dimensions, or its number of clips or
            images differs from the number of labels; or clips are padded.
        NonFiniteWeightsError: logits are NaN or infinite, because weights are. The error names the
            entries.
        EvaluationError: logits are NaN or infinite, and all weights are finite.

    Warns:
        TextFeaturesWarning: a :class:`openvclip.ZeroShotClassifier` has text features of other
            weights than its model has now.
    """
    warn_of_other_text(classifier)
    (evaluation,) = evaluate_each(
        [lambda video: classifier(video)],
        classifier,
        loader,
        progress=progress,
        description=description,
    )
    return evaluation


def evaluate_each(
    variants: Sequence[Callable[[Tensor], Tensor]],
    classifier: nn.Module,
    loader: Iterable[Sequence[Any]],
    *,
    progress: bool | None = None,
    description: str = "evaluate",
) -> list[Evaluation]:
    """Evaluate several functions from clips to logits. Each batch is read once.

    Args:
        variants: functions from clips ``[B, T, C, H, W]`` to logits ``[B, K]``.
        classifier: the module that the functions use. The module is set to eval mode.
        loader: see :func:`openvclip.evaluation.evaluate`.
        progress: whether to show a progress bar. Default: only in a terminal.
        description: text in front of the progress bar.

    Returns:
        The evaluation of each function.

    Raises:
        UsageError, VideoShapeError, NonFiniteWeightsError, EvaluationError: see
            :func:`openvclip.evaluation.evaluate`.
    """
    device = next(classifier.parameters()).device
    parts: list[list[Evaluation]] = [[] for _ in variants]
    bar = progress_bar(loader, desc=description, disable=None if progress is None else not progress)
    with evaluation_mode(classifier), torch.no_grad():
        for batch in bar:
            video, label = _clips_and_labels(batch)
            broken = broken_clips(batch)
            on_device = video.to(device, non_blocking=True)
            for logits_of, evaluations in zip(variants, parts, strict=True):
                logits = summed_over_views(logits_of, on_device).cpu()
                _require_a_row_each(logits, video, label)
                readable = logits
                if any(broken):  # in new tensors: the logits can belong to the classifier
                    rows = torch.tensor(broken)[:, None]
                    readable = logits.masked_fill(rows, 0.0)
                    logits = logits.masked_fill(rows, float("nan"))
                require_finite(readable, lambda: weights_of(classifier), "The logits")
                evaluations.append(score(logits, label))
    return [_concatenated(evaluations) for evaluations in parts]


def score(logits: Tensor, targets: Tensor) -> Evaluation:
    """Compute predictions and ranks from logits.

    Args:
        logits: ``[N, K]``, on the CPU. A row that contains NaN is a clip without a prediction.
        targets: indices of the true classes, ``[N]``.
    """
    targets = targets.cpu().long()
    without_prediction = logits.isnan().any(dim=1)
    true_logits = logits.gather(1, targets[:, None])
    ranks = logits.shape[1] - 1 - (logits < true_logits).sum(dim=1)
    return Evaluation(
        predictions=logits.argmax(dim=1).masked_fill(without_prediction, -1),
        targets=targets,
        ranks=ranks.masked_fill(without_prediction, NO_RANK),
    )


def summed_over_views(logits_of: Callable[[Tensor], Tensor], video: Tensor) -> Tensor:
    """Return the logits ``[B, K]`` of a batch of a loader, summed over the views of each clip.

    Logits in half precision are summed in float32: the sum has more digits than a logit.

    Args:
        logits_of: function from clips ``[B, T, C, H, W]``, or images, to logits ``[B, K]``.
        video: a batch as :func:`evaluate` takes it.

    Raises:
        VideoShapeError: the batch does not have 4 to 6 dimensions.
    """
    if video.ndim == 6:
        logits = logits_of(video.flatten(0, 1)).unflatten(0, video.shape[:2])
        summed: Tensor = logits.to(compute_dtype(logits.dtype)).sum(dim=1)
        return summed
    if video.ndim not in (4, 5):
        raise VideoShapeError(
            f"The loader returned a video batch of shape {list(video.shape)}; expected "
            "[B, T, C, H, W], [B, V, T, C, H, W] with V views of each clip, or images "
            "[B, C, H, W]."
        )
    return logits_of(video)


def broken_clips(batch: Any) -> list[bool]:
    """Return whether each clip of a batch could not be read; ``[]`` if the batch does not say it.

    Raises:
        VideoShapeError: the clips have different lengths, and are padded.
    """
    if isinstance(batch, PaddedSamples) and not bool(batch.mask.all()):
        raise VideoShapeError(
            "The loader returned clips of different lengths, which are padded. A classifier would "
            "take the padding for frames. Use a sampler with a fixed number of frames, or "
            "openvclip.evaluation.evaluate_protocol, which encodes the frames of each clip alone."
        )
    known = isinstance(batch, (VideoSample, PaddedSamples))
    return [bool(error) for error in batch.error] if known else []


def _clips_and_labels(batch: Any) -> Sequence[Tensor]:
    pair = batch[:2] if isinstance(batch, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair):
        raise UsageError(
            f"The loader returned a {type(batch).__name__}; expected a tuple or list (video, "
            "label) of two tensors, or a batch of VideoSample."
        )
    return pair


def _require_a_row_each(logits: Tensor, video: Tensor, label: Tensor) -> None:
    """Check that there are as many rows of logits as labels."""
    if len(logits) != len(label):
        hint = ""
        if video.ndim == 4:
            hint = " A tensor of 4 dimensions is a batch of images [B, C, H, W]: use video[None] "
            hint += "for one clip [T, C, H, W]."
        raise VideoShapeError(
            f"A batch of shape {list(video.shape)} gave {len(logits)} rows of logits, and the "
            f"loader returned {len(label)} labels with it; expected one label a row.{hint}"
        )


def weights_of(classifier: nn.Module) -> dict[str, Tensor]:
    """Return the live entries of the model of a classifier, or of the classifier itself."""
    model = getattr(classifier, "model", None)
    return named_state(model if isinstance(model, nn.Module) else classifier)


def _concatenated(parts: list[Evaluation]) -> Evaluation:
    if not parts:
        empty = torch.empty(0, dtype=torch.long)
        return Evaluation(empty, empty, empty)
    columns = ([getattr(part, entry.name) for part in parts] for entry in fields(Evaluation))
    return Evaluation(*(torch.cat(column) for column in columns))
