"""The results of a retrieval protocol, as objects, as JSON and as a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from openvclip.errors import EvaluationError
from openvclip.evaluation.ranking import RECALLS, RetrievalMetrics
from openvclip.evaluation.tables import markdown_table, timing_as_json
from openvclip.evaluation.timing import Timing
from openvclip.video import Failure

__all__ = ["RetrievalEvaluation", "RetrievalScore", "retrieval_json", "retrieval_table"]

_COLUMNS = [*(f"R{k}" for k in RECALLS), "MedianR", "MeanR"]
_TITLES = {**{f"R{k}": f"R@{k}" for k in RECALLS}, "MedianR": "MdR", "MeanR": "MnR"}
_DIRECTIONS = {"text_to_video": "T2V", "video_to_text": "V2T"}


@dataclass(frozen=True)
class RetrievalScore:
    """The result of a model on a retrieval protocol, at one interpolation weight.

    Attributes:
        metrics: the result of :func:`openvclip.evaluation.retrieval_metrics`.
        dual_softmax: the metrics with :func:`openvclip.evaluation.dual_softmax`. They use all texts
            of the test set at once, and are not comparable with ``metrics``.
        n_texts: number of captions that are counted.
        n_videos: number of videos that are counted.
        left_out: number of videos that could not be read and are not counted.
        similarities: ``[n_texts, n_videos]``, float32: cosines times the scale of the model. Minus
            infinity for a video that could not be read and is counted.
    """

    metrics: RetrievalMetrics
    dual_softmax: RetrievalMetrics
    n_texts: int
    n_videos: int
    left_out: int
    similarities: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class RetrievalEvaluation:
    """The results of a model on a retrieval protocol.

    Attributes:
        name: name of the test set, such as ``"msrvtt-1ka"``.
        scores: the scores for each interpolation weight λ. The key is ``None`` if the model was
            evaluated with its own weights.
        failures: the videos that could not be read. ``position`` is the index of a video in the
            test set.
        timing: the time of this run. Earlier runs are not counted.
        settings: everything that the results depend on, such as frames, pixels and pooling.
    """

    name: str
    scores: dict[float | None, RetrievalScore]
    failures: list[Failure]
    timing: Timing
    settings: Mapping[str, Any] = field(default_factory=dict)

    def of(self, lam: float | None = None) -> RetrievalScore:
        """Return the score at one interpolation weight.

        Args:
            lam: interpolation weight of the original CLIP. May be omitted if the model was
                evaluated at one weight only.

        Raises:
            EvaluationError: the model was not evaluated at ``lam``.
        """
        if lam is None and len(self.scores) == 1:
            (lam,) = self.scores
        if lam not in self.scores:
            known = ", ".join(map(str, self.scores))
            raise EvaluationError(
                f"lam={lam}: the model was not evaluated with this value; expected one of {known}."
            )
        return self.scores[lam]


def retrieval_json(result: RetrievalEvaluation, *, dual_softmax: bool = False) -> dict[str, Any]:
    """Return a result as JSON objects. Recalls are percentages.

    Args:
        result: the result of :func:`openvclip.evaluation.evaluate_retrieval`.
        dual_softmax: whether to add the metrics with the dual softmax, in entries of their own.
    """
    results = []
    for lam, score in result.scores.items():
        entry: dict[str, Any] = {
            "protocol": result.name,
            "lam": lam,
            "texts": score.n_texts,
            "videos": score.n_videos,
            "left_out": score.left_out,
            **score.metrics,
        }
        if dual_softmax:
            entry["dual_softmax"] = score.dual_softmax
        results.append(entry)
    return {
        "settings": dict(result.settings),
        "results": results,
        "unreadable": [failure._asdict() for failure in result.failures],
        "timing": timing_as_json(result.timing),
    }


def retrieval_table(result: RetrievalEvaluation, name: str, *, dual_softmax: bool = False) -> str:
    """Format a result as a Markdown table with a row for each λ.

    The columns are the recalls in per cent, the median rank (MdR) and the mean rank (MnR) of
    text-to-video (T2V) and of video-to-text retrieval (V2T).

    Args:
        result: the result of :func:`openvclip.evaluation.evaluate_retrieval`.
        name: the name of the model, for the first column.
        dual_softmax: whether the table holds the metrics with the dual softmax instead.
    """
    titles = [f"{short} {_TITLES[c]}" for short in _DIRECTIONS.values() for c in _COLUMNS]
    rows = []
    for lam, score in result.scores.items():
        metrics = score.dual_softmax if dual_softmax else score.metrics
        values = [f"{metrics[direction][c]:.1f}" for direction in _DIRECTIONS for c in _COLUMNS]
        rows.append([name, "" if lam is None else f"{lam:g}", *values])
    return markdown_table(["model", "λ", *titles], rows)
