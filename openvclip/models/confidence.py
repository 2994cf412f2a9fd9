"""How sure a prediction is: scores, a threshold for "none of these", and the temperature.

Most functions take tensors and need no model. :func:`calibrate` takes predictions on clips of one's
own and returns the settings that :func:`openvclip.predict` uses afterwards.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from openvclip.checkpoints.contract import Confidence
from openvclip.errors import CalibrationWarning, UsageError, did_you_mean

if TYPE_CHECKING:
    from openvclip.models.prediction import Prediction

Score = Literal["cosine", "probability", "energy"]
"""The number that is compared with the threshold; see :func:`confidence_score`."""

SCORES: tuple[Score, ...] = get_args(Score)
"""All scores."""
DEFAULT_SCORE: Score = "cosine"
"""The score if none is given. docs/none-of-these.md compares the scores."""

_RANGES: dict[Score, tuple[float, float]] = {
    "cosine": (-1.0, 1.0),
    "probability": (0.0, 1.0),
    "energy": (-math.inf, math.inf),
}

NONE = -1
"""The class index of a clip that belongs to none of the labels."""


def confidence_score(score: Score, cosines: Tensor, logits: Tensor) -> Tensor:
    """Compute how sure a classifier is that a clip belongs to one of its labels.

    Args:
        score: the score to compute. ``"cosine"``: the highest cosine of a label. ``"probability"``:
            the highest probability of a label; it needs background texts, because without them the
            probabilities only compare the labels. ``"energy"``: the logarithm of the sum of
            ``exp(logit)`` over the labels; it grows with the number of labels.
        cosines: cosines of the K labels, ``[..., K]``.
        logits: logits of the K labels, followed by those of background texts if there are some,
            ``[..., K + B]``, divided by the temperature.

    Returns:
        A float tensor ``[...]``. Higher is surer.

    Raises:
        UsageError: ``score`` is not known.
    """
    require_score(score)
    n_labels = cosines.shape[-1]
    if score == "cosine":
        return cosines.max(dim=-1).values
    if score == "energy":
        return logits[..., :n_labels].logsumexp(dim=-1)
    return logits.softmax(dim=-1)[..., :n_labels].max(dim=-1).values


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """Return the temperature T with the lowest negative log-likelihood (NLL) of true labels.

    The probabilities are ``softmax(logits / T)``. A temperature above 1 makes them less sure. The
    NLL is convex in 1 / T. Its minimum is found in float64, up to rounding.

    Args:
        logits: logits of N clips, ``[N, K]``.
        targets: class indices of the clips, integers ``[N]``.

    Raises:
        UsageError: the shapes are wrong, there are fewer than two clips or classes, an index
            is out of range, or a logit is NaN or infinite. Or the NLL has no minimum: the true
            label of each clip has the highest logit, or the logits of true labels are no higher
            than the mean logits of all labels.

    Source: Guo et al., "On calibration of modern neural networks" (2017), Section 4.2.
    """
    values, indices = _checked_logits(logits, targets)
    true = values.gather(1, indices[:, None])[:, 0]

    def slope(inverse: float) -> float:
        """The derivative of the NLL with respect to 1 / T. It grows with 1 / T."""
        weights = (inverse * values).softmax(dim=1)
        return float(((weights * values).sum(dim=1) - true).mean())

    if _are_all_correct(values, indices):
        raise UsageError(
            f"All {len(values)} clips are classified correctly, so the NLL has no minimum: the "
            "lower the temperature, the lower the NLL. Give more clips, also difficult ones."
        )
    if slope(0.0) >= 0:
        raise UsageError(
            f"The logits of the true labels of {len(values)} clips are on average no higher than "
            "those of the other texts. Check that the targets belong to these clips and labels, "
            "and that the background texts describe other things."
        )
    low, high = _bracket(slope)
    for _ in range(200):
        middle = math.sqrt(low * high)
        if not low < middle < high:
            break
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / math.sqrt(low * high)


def _are_all_correct(logits: Tensor, indices: Tensor) -> bool:
    """Return whether the true label of each clip has the highest logit, alone or with others."""
    true = logits.gather(1, indices[:, None])[:, 0]
    return bool((true == logits.max(dim=1).values).all())


def _checked_logits(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits in float64 and class indices, both on the CPU."""
    if logits.ndim != 2 or targets.shape != logits.shape[:1] or logits.shape[1] < 2:
        raise UsageError(
            f"logits has shape {list(logits.shape)} and targets {list(targets.shape)}; expected "
            "[N, K] and [N], with at least 2 classes."
        )
    if len(logits) < 2:
        raise UsageError(f"Targets are given for {len(logits)} clips; expected at least 2.")
    values, indices = logits.detach().cpu().double(), targets.detach().cpu().long()
    if not bool(torch.isfinite(values).all()):
        raise UsageError("Some logits are NaN or infinite; expected finite logits.")
    if int(indices.min()) < 0 or int(indices.max()) >= values.shape[1]:
        raise UsageError(
            f"targets lie between {int(indices.min())} and {int(indices.max())}; expected class "
            f"indices from 0 to {values.shape[1] - 1}."
        )
    return values, indices


def _bracket(slope: Callable[[float], float]) -> tuple[float, float]:
    """Return two values of 1 / T: the slope is negative at the first and not at the second."""
    low = high = 1.0
    while slope(low) >= 0:
        low /= 2
    while slope(high) < 0:
        high *= 2
    return low, high


def threshold_to_keep(scores: Tensor, keep: float) -> float:
    """Return a threshold that a share ``keep`` of new clips reaches.

    Let ``k = floor((N + 1) (1 - keep))``. The threshold is the k-th lowest of the N scores. If new
    clips come from the same source, the expected share of new clips whose score is at least the
    threshold is ``1 - k / (N + 1)``, so at least ``keep``.

    Args:
        scores: scores of N clips that belong to one of the labels, ``[N]``.
        keep: the share, in (0, 1).

    Raises:
        UsageError: ``scores`` is not ``[N]``, holds NaN or infinity, or ``keep`` is not in
            (0, 1); or there are too few clips, ``N < keep / (1 - keep)``.

    Source: the quantile of split conformal prediction, Papadopoulos et al. (2002).
    """
    require_calibration(keep)
    if scores.ndim != 1:
        raise UsageError(f"scores has shape {list(scores.shape)}; expected [N].")
    if not bool(torch.isfinite(scores).all()):
        raise UsageError("Some scores are NaN or infinite; expected finite scores.")
    rank = math.floor((len(scores) + 1) * (1 - keep) + 1e-9)  # (19 + 1) * (1 - 0.95) is below 1
    if rank < 1:
        needed = math.ceil(keep / (1 - keep) - 1e-9)
        raise UsageError(
            f"{len(scores)} clips belong to the labels; keep={keep:g} needs at least {needed}. "
            "Give more clips, or a lower keep."
        )
    return float(scores.double().sort().values[rank - 1])


def _temperature_of(logits: Tensor, indices: Tensor) -> float:
    """Return the fitted temperature, or 1 with a warning if all clips are classified correctly."""
    if logits.shape[1] == 1:  # one label without background texts: its probability is 1
        return 1.0
    values, indices = _checked_logits(logits, indices)
    if not _are_all_correct(values, indices):
        return fit_temperature(values, indices)
    warnings.warn(
        f"All {len(values)} clips are classified correctly, so the temperature can't be chosen and "
        "stays 1. Give more clips, also difficult ones.",
        CalibrationWarning,
        stacklevel=3,
    )
    return 1.0


def effective_confidence(
    confidence: Confidence | None, reject: bool | float | None
) -> tuple[Confidence, Score]:
    """Return the settings of a prediction, with ``reject`` as the threshold if it is a number.

    Args:
        confidence: see :func:`openvclip.predict`.
        reject: see :func:`openvclip.predict`.

    Returns:
        The settings, and the score that is compared with the threshold.

    Raises:
        UsageError: ``reject`` is ``True`` without a calibrated threshold, or is a number that the
            score can't have; or the score is not known.
    """
    settings = confidence or Confidence()
    score = require_score(DEFAULT_SCORE if settings.score is None else settings.score)
    if reject is True and settings.threshold is None:
        raise UsageError(
            "reject=True needs a calibrated threshold. Call calibrate with clips of your own "
            "first, or give a number: reject=0.2 rejects videos with a lower score."
        )
    if reject is None or isinstance(reject, bool):
        return settings, score
    return replace(settings, threshold=_number_of(reject, score)), score


def _number_of(reject: object, score: Score) -> float:
    lowest, highest = _RANGES[score]
    if not _is_number(reject) or not lowest <= float(reject) <= highest:  # type: ignore[arg-type]
        within = f" from {lowest:g} to {highest:g}" if math.isfinite(lowest) else ""
        raise UsageError(
            f"reject={reject!r}: expected True, False, or a number{within}, which is compared with "
            f"the score {score!r}."
        )
    return float(reject)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def require_score(score: str) -> Score:
    """Return ``score``, or raise :class:`UsageError` if it is not known."""
    for known in SCORES:
        if score == known:
            return known
    raise UsageError(
        f"score={score!r} is not known{did_you_mean(str(score), SCORES)}: choose one of "
        f"{', '.join(map(repr, SCORES))}."
    )


def require_calibration(keep: float, score: str = DEFAULT_SCORE) -> None:
    """Check the settings of a calibration, before videos are read.

    Raises:
        UsageError: ``keep`` is not in (0, 1), or ``score`` is not known.
    """
    require_score(score)
    if not _is_number(keep) or not 0 < keep < 1:
        raise UsageError(f"keep={keep!r}: expected a share between 0 and 1, such as 0.95.")


def target_indices(
    targets: Sequence[str | int | None] | Tensor, labels: Sequence[str], n_clips: int
) -> Tensor:
    """Return the class index of each clip, int64 ``[N]``; -1 for a clip that is none of the labels.

    Args:
        targets: for each of N clips: a label, its index, or ``None`` or -1 for a clip that is none
            of the labels.
        labels: the labels.
        n_clips: N.

    Raises:
        UsageError: there are not N targets, a label is not known, or an index is out of range.
    """
    if isinstance(targets, str) or not isinstance(targets, Iterable):
        raise UsageError(f"targets is {targets!r}; expected a target for each clip.")
    values = targets.tolist() if isinstance(targets, Tensor) else list(targets)
    if len(values) != n_clips:
        raise UsageError(f"{len(values)} targets are given for {n_clips} clips; expected one each.")
    place = {label: index for index, label in enumerate(labels)}
    indices = []
    for value in values:
        if isinstance(value, str):
            if value not in place:
                raise UsageError(
                    f"The target {value!r} is not one of the {len(labels)} labels"
                    f"{did_you_mean(value, labels)}. Give None for a clip that is none of them."
                )
            indices.append(place[value])
        elif value is None:
            indices.append(NONE)
        elif isinstance(value, int) and not isinstance(value, bool) and NONE <= value < len(labels):
            indices.append(value)
        else:
            raise UsageError(
                f"The target {value!r} is no label; expected a label, an index from 0 to "
                f"{len(labels) - 1}, or None for a clip that is none of the labels."
            )
    return torch.tensor(indices, dtype=torch.long)


def stacked(predictions: Sequence[Prediction]) -> tuple[list[str], Tensor, Tensor]:
    """Return the labels, cosines ``[N, K]`` and logits ``[N, K + B]`` of predictions.

    Raises:
        UsageError: there are no predictions, they have different labels or background texts, or
            they were made without cosines and logits.
    """
    if not predictions:
        raise UsageError("There are no predictions; expected one for each clip.")
    first = predictions[0]
    cosines, logits = [], []
    for prediction in predictions:
        same = prediction.labels == first.labels
        if not same or list(prediction.background) != list(first.background):
            raise UsageError(
                "The predictions have different labels or background texts; expected the same for "
                "all clips."
            )
        if prediction.cosines is None or prediction.logits is None:
            raise UsageError(
                f"The prediction of {prediction.path} has no cosines and logits; expected "
                "predictions of openvclip.predict."
            )
        cosines.append(prediction.cosines)
        logits.append(prediction.logits)
    return first.labels, torch.stack(cosines), torch.stack(logits)


def calibrate(
    predictions: Sequence[Prediction],
    targets: Sequence[str | int | None] | Tensor | None = None,
    *,
    keep: float = 0.95,
    score: Score = DEFAULT_SCORE,
) -> Confidence:
    """Choose a threshold for "none of these", and the temperature, from predictions on own clips.

    The threshold keeps a share ``keep`` of the clips that belong to a label; see
    :func:`threshold_to_keep`. The temperature is fitted only with ``targets``, on the same clips;
    see :func:`fit_temperature`.

    Args:
        predictions: predictions on N clips that the model was not trained on, all with the labels
            and background texts of later use.
        targets: the label of each clip, or its index; ``None`` or -1 for a clip that is none of the
            labels. Such clips do not change the result. Default: every clip belongs to some label.
        keep: share of clips of the labels that a threshold must not reject, in (0, 1).
        score: the score to compare with the threshold; see :func:`confidence_score`.

    Returns:
        Settings for the argument ``confidence`` of :func:`openvclip.predict`.

    Raises:
        UsageError: there are too few clips for ``keep``; ``keep`` is not in (0, 1); ``score`` is
            not known; ``targets`` do not fit the clips and labels, or the logits of the true labels
            are no higher than those of the other labels.

    Warns:
        CalibrationWarning: all clips are classified correctly, so the temperature stays 1.
    """
    require_calibration(keep, score)
    labels, cosines, logits = stacked(predictions)
    inside = torch.ones(len(cosines), dtype=torch.bool)
    temperature = 1.0
    if targets is not None:
        indices = target_indices(targets, labels, len(cosines))
        inside = indices != NONE
        temperature = _temperature_of(logits[inside], indices[inside])
    scores = confidence_score(score, cosines, logits / temperature)
    return Confidence(
        temperature=temperature,
        threshold=threshold_to_keep(scores[inside], keep),
        score=score,
        keep=keep,
        clips=int(inside.sum()),
    )
