"""Measure how far the confidence of a classifier can be trusted: AUROC, coverage, calibration.

The functions take one value for each clip. They compute in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openvclip.errors import EvaluationError, UsageError
from openvclip.models.confidence import NONE, stacked, target_indices
from openvclip.models.prediction import Prediction

_ROUNDING = 1e-6  # the softmax of float32 can exceed 1 by its rounding


@dataclass(frozen=True)
class CoverageCurve:
    """The accuracy of a classifier that answers only if its score is high enough.

    Entry ``i`` describes the classifier that answers the clips whose score is at least
    ``thresholds[i]``.

    Attributes:
        thresholds: the M different scores, highest first, float64 ``[M]``.
        coverage: share of all clips that are answered, in (0, 1], float64 ``[M]``.
        accuracy: share of the answered clips whose answer is right, in [0, 1], float64 ``[M]``.
        aurc: area under the risk-coverage curve, in [0, 1]; see :func:`accuracy_coverage`. Lower is
            better.
    """

    thresholds: Tensor
    coverage: Tensor
    accuracy: Tensor
    aurc: float

    def accuracy_at(self, coverage: float) -> float:
        """Return the accuracy at the smallest coverage that is at least ``coverage``.

        Args:
            coverage: share of the clips that have to be answered, in [0, 1].

        Raises:
            EvaluationError: ``coverage`` is not in [0, 1].
        """
        if not 0 <= coverage <= 1:
            raise EvaluationError(f"coverage={coverage!r}: expected a share from 0 to 1.")
        enough = self.coverage >= coverage
        return float(self.accuracy[enough][0])


@dataclass(frozen=True)
class ConfidenceReport:
    """How far the predictions on clips with known labels can be trusted.

    Shares are in [0, 1]. A share of no clips is NaN.

    Attributes:
        n_clips: number of clips that belong to one of the labels.
        n_none: number of clips that belong to none of the labels.
        top1: share of the clips of the labels whose most probable label is right.
        ece: :func:`expected_calibration_error` of the most probable labels, on clips of the labels.
        auroc: :func:`auroc` of the score: clips of the labels are positive. NaN without clips of
            either kind.
        kept: share of the clips of the labels that are not rejected.
        rejected: share of the clips of none of the labels that are rejected.
        right_answers: share of the answered clips, of both kinds, whose answer is right.
        curve: accuracy over coverage of the score, on all clips.
    """

    n_clips: int
    n_none: int
    top1: float
    ece: float
    auroc: float
    kept: float
    rejected: float
    right_answers: float
    curve: CoverageCurve

    def __str__(self) -> str:
        rows = [
            (f"right among {self.n_clips} clips of the labels", self.top1),
            ("calibration error (ECE) of these clips", self.ece),
            ("kept of these clips", self.kept),
            (f"rejected of {self.n_none} clips of none of the labels", self.rejected),
            ("right among the answered clips", self.right_answers),
            ("AUROC of the score", self.auroc),
            ("area under the risk-coverage curve", self.curve.aurc),
        ]
        return "\n".join(f"{value:6.1%}  {name}" for name, value in rows)


def confidence_report(
    predictions: Sequence[Prediction], targets: Sequence[str | int | None] | Tensor
) -> ConfidenceReport:
    """Measure calibration and rejection on clips with known labels.

    Use other clips than those of :func:`openvclip.models.calibrate`. A report of predictions
    without ``confidence`` and a report of predictions with ``confidence`` show what the calibration
    changes.

    Args:
        predictions: a prediction for each of N clips, all with the same labels.
        targets: for each clip: its label, the index of its label, or ``None`` or -1 if the clip is
            none of the labels.

    Raises:
        UsageError: there are no predictions, or they have different labels; or ``targets`` do not
            fit the clips and labels.
    """
    labels, cosines, _ = stacked(predictions)
    indices = target_indices(targets, labels, len(cosines))
    best = torch.stack([prediction.probabilities for prediction in predictions]).max(dim=1)
    values = [_score_of(prediction) for prediction in predictions]
    scores = torch.tensor(values, dtype=torch.float64)
    rejected = torch.tensor([prediction.rejected for prediction in predictions])
    inside = indices != NONE
    correct = best.indices == indices  # never on a clip that is none of the labels
    both = bool(inside.any()) and not bool(inside.all())
    return ConfidenceReport(
        n_clips=int(inside.sum()),
        n_none=int((~inside).sum()),
        top1=_share(correct[inside]),
        ece=expected_calibration_error(best.values[inside], correct[inside])
        if bool(inside.any())
        else float("nan"),
        auroc=auroc(scores, inside) if both else float("nan"),
        kept=_share(~rejected[inside]),
        rejected=_share(rejected[~inside]),
        right_answers=_share(correct[~rejected]),
        curve=accuracy_coverage(scores, correct),
    )


def _score_of(prediction: Prediction) -> float:
    if prediction.score is None:
        raise UsageError(
            f"The prediction of {prediction.path} has no score; expected predictions of "
            "openvclip.predict."
        )
    return prediction.score


def _share(flags: Tensor) -> float:
    return float(flags.double().mean()) if len(flags) else float("nan")


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Compute the area under the ROC curve of a score that separates two groups of clips.

    It is the probability that a random positive clip has a higher score than a random negative
    clip. Equal scores count one half. 1 is a perfect separation, and 0.5 is chance.

    Args:
        scores: a score for each clip, ``[N]``.
        positive: whether each clip belongs to the positive group, bool ``[N]``. For example,
            positive clips belong to one of the labels, and negative clips belong to none.

    Raises:
        EvaluationError: the shapes differ, a score is NaN, or all clips are in one group.
    """
    values, positive = _checked(scores, positive, "positive")
    n_positive = int(positive.sum())
    n_negative = len(values) - n_positive
    if not n_positive or not n_negative:
        raise EvaluationError(
            f"{n_positive} clips are positive and {n_negative} are negative; expected at least one "
            "of each. Add clips that belong to none of the labels, or to one of them."
        )
    _, group = values.unique(return_inverse=True)  # equal scores are one group; lowest first
    in_group = torch.bincount(group[positive], minlength=int(group.max()) + 1).double()
    against = torch.bincount(group[~positive], minlength=len(in_group)).double()
    below = against.cumsum(0) - against
    return float((in_group * (below + against / 2)).sum() / (n_positive * n_negative))


def accuracy_coverage(scores: Tensor, correct: Tensor) -> CoverageCurve:
    """Compute the accuracy over the coverage of a classifier that can decline to answer.

    The clips are answered in the order of their scores, highest first. The area under the
    risk-coverage curve is the mean, over n = 1 to N, of the share of wrong answers among the first
    n clips. Clips with equal scores are taken in random order, and the area is the expected value.

    Args:
        scores: a score for each clip, ``[N]``.
        correct: whether the answer for each clip is right, bool ``[N]``. The answer for a clip that
            belongs to none of the labels is never right.

    Raises:
        EvaluationError: the shapes differ, a score is NaN, or there are no clips.

    Source: the area under the risk-coverage curve is that of Geifman, Uziel and El-Yaniv,
    "Bias-reduced uncertainty estimation for deep neural classifiers" (2019).
    """
    values, correct = _checked(scores, correct, "correct")
    thresholds, group, sizes = (-values).unique(return_inverse=True, return_counts=True)
    right = torch.bincount(group[correct], minlength=len(sizes)).double()
    answered, answered_right = sizes.cumsum(0), right.cumsum(0)
    # The expected number of right answers among the first n clips grows evenly within a group.
    count = torch.arange(1, len(values) + 1, dtype=torch.float64)
    within = torch.arange(len(sizes)).repeat_interleave(sizes)
    missing = (answered[within] - count) / sizes[within]
    expected_right = answered_right[within] - missing * right[within]
    return CoverageCurve(
        thresholds=-thresholds,
        coverage=answered.double() / len(values),
        accuracy=answered_right / answered,
        aurc=float((1 - expected_right / count).mean()),
    )


def expected_calibration_error(probabilities: Tensor, correct: Tensor, *, bins: int = 15) -> float:
    """Compute the expected calibration error (ECE) of the probabilities of answers.

    The interval [0, 1] is divided into bins of equal width. The error of a bin is the distance
    between the accuracy and the mean probability of its clips. The ECE is the mean of the errors,
    weighted by the number of clips. 0 is the best value: of the answers with probability 80 %, 80 %
    are right.

    Args:
        probabilities: the probability of the answer for each clip, ``[N]``, in [0, 1].
        correct: whether the answer for each clip is right, bool ``[N]``.
        bins: number of bins. A bin includes its upper end, and the first bin also includes 0.

    Raises:
        EvaluationError: the shapes differ, a probability is NaN or outside [0, 1], there are no
            clips, or ``bins`` is below 1.

    Source: Guo et al., "On calibration of modern neural networks" (2017), Equation 3.
    """
    values, correct = _checked(probabilities, correct, "correct")
    if bins < 1:
        raise EvaluationError(f"bins={bins!r}: expected a whole number of at least 1.")
    if float(values.min()) < 0 or float(values.max()) > 1 + _ROUNDING:
        raise EvaluationError(
            f"probabilities lie between {float(values.min()):g} and {float(values.max()):g}; "
            "expected values from 0 to 1. Apply softmax to logits first."
        )
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    place = torch.bucketize(values, edges[1:-1])
    surplus = torch.zeros(bins, dtype=torch.float64)
    surplus.index_add_(0, place, correct.double() - values)
    return float(surplus.abs().sum() / len(values))


def _checked(values: Tensor, flags: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return values in float64 and flags as bool, both on the CPU."""
    if values.ndim != 1 or values.shape != flags.shape:
        raise EvaluationError(
            f"{name} has shape {list(flags.shape)} for values of shape {list(values.shape)}; "
            "expected [N] for both, one value for each clip."
        )
    if not len(values):
        raise EvaluationError("There are no clips; expected at least one.")
    if bool(values.isnan().any()):
        raise EvaluationError(
            f"{int(values.isnan().sum())} of {len(values)} values are NaN. Leave these clips out, "
            "or find out why the model returns NaN."
        )
    if not bool(((flags == 0) | (flags == 1)).all()):
        raise EvaluationError(f"{name} holds other values than 0 and 1; expected a bool tensor.")
    return values.detach().cpu().double(), flags.detach().cpu().bool()
