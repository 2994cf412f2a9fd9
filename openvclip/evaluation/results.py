"""The results of an evaluation on the splits of protocols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from openvclip.errors import EvaluationError
from openvclip.evaluation.accuracy import Evaluation
from openvclip.evaluation.timing import Timing
from openvclip.video import Failure


@dataclass(frozen=True)
class Answers:
    """The best classes of each of N videos of K classes.

    Attributes:
        paths: path of each video, relative to the folder of the videos.
        labels: indices of the C = min(5, K) classes with the highest logits, best first, int64
            ``[N, C]``. -1 for a video without a prediction.
        scores: the cosine similarity of the video and each of these classes, the mean over frames
            and views, float32 ``[N, C]``. NaN for a video without a prediction.
    """

    paths: list[str]
    labels: Tensor
    scores: Tensor


@dataclass(frozen=True)
class SplitScore:
    """The result of a model on one split.

    Attributes:
        name: the name of the split.
        class_names: K class names in the order of their indices.
        evaluation: predictions and ranks of the N videos that are counted.
        left_out: number of videos that could not be read and are not counted.
        protocol: the protocol of the split.
        answers: the best classes of each video with their scores. ``None`` if they are not known.
    """

    name: str
    class_names: list[str]
    evaluation: Evaluation
    left_out: int = 0
    protocol: str = ""
    answers: Answers | None = None

    def per_class(self) -> dict[str, float]:
        """Return the top-1 accuracy of each class in [0, 1]. NaN for a class without videos."""
        values = self.evaluation.per_class(len(self.class_names)).tolist()
        return dict(zip(self.class_names, values, strict=True))

    def confusion(self) -> Tensor:
        """Return the confusion matrix, int64 ``[K, K]``.

        Entry ``[i, j]`` is the number of videos of class ``i`` that are predicted as class ``j``.
        """
        return self.evaluation.confusion(len(self.class_names))


@dataclass(frozen=True)
class ProtocolEvaluation:
    """The results of a model on the splits of one or more protocols.

    Attributes:
        scores: the scores of the splits for each interpolation weight λ. The key is ``None`` if the
            model was evaluated with its own weights.
        failures: the videos that could not be read. ``position`` is the index of a video in the
            list of all videos, in the order of the splits.
        timing: the time of this run. Earlier runs are not counted.
        settings: everything that the features depend on.
        videos: the folder of the videos, an absolute path. ``""`` if the folder is not known.
    """

    scores: dict[float | None, list[SplitScore]]
    failures: list[Failure]
    timing: Timing
    settings: dict[str, Any] = field(default_factory=dict)
    videos: str = ""

    @property
    def protocols(self) -> list[str]:
        """The protocols of the splits, in the order of the splits."""
        scores = next(iter(self.scores.values()))
        return list(dict.fromkeys(score.protocol for score in scores))

    def of(self, lam: float | None = None, protocol: str | None = None) -> list[SplitScore]:
        """Return the scores of the splits at one interpolation weight.

        Args:
            lam: interpolation weight of the original CLIP. May be omitted if the model was
                evaluated at one weight only.
            protocol: return only the splits of this protocol. Default: all splits.

        Raises:
            EvaluationError: the model was not evaluated at ``lam`` or on ``protocol``.
        """
        if lam is None and len(self.scores) == 1:
            (lam,) = self.scores
        _require_known("lam", lam, list(self.scores))
        _require_known("protocol", protocol, [None, *self.protocols])
        return [score for score in self.scores[lam] if protocol in (None, score.protocol)]

    def top(self, k: int, lam: float | None = None, protocol: str | None = None) -> list[float]:
        """Return the top-``k`` accuracy of each split, in [0, 1].

        Args:
            k: a prediction is correct if the true class is among the ``k`` highest logits.
            lam: see :meth:`of`.
            protocol: see :meth:`of`.

        Raises:
            EvaluationError: see :meth:`of`.
        """
        return [score.evaluation.top(k) for score in self.of(lam, protocol)]


def _require_known(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        expected = ", ".join(map(str, known))
        raise EvaluationError(
            f"{name}={value}: the model was not evaluated with this value; expected one of "
            f"{expected}."
        )
