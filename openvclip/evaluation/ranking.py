"""The metrics of text-to-video retrieval: recall at K, and the median and mean rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openvclip.errors import EvaluationError, listed

__all__ = ["RECALLS", "RetrievalMetrics", "dual_softmax", "retrieval_metrics"]

RECALLS: tuple[int, ...] = (1, 5, 10)
"""K of the recalls R@K."""

RetrievalMetrics = dict[str, dict[str, float]]
"""The metrics of both directions, as :func:`retrieval_metrics` returns them."""


def retrieval_metrics(
    similarities: Tensor | np.ndarray[Any, Any],
    captions_per_video: Sequence[int] | Tensor | np.ndarray[Any, Any] | None = None,
) -> RetrievalMetrics:
    """Compute the metrics of text-to-video and of video-to-text retrieval.

    A rank counts from 1. **A tie counts against the model**: the rank of the right video is the
    number of videos whose similarity is at least that of the right video. So a model that gives all
    videos the same similarity has the worst ranks.

    With one caption for each video, caption ``i`` belongs to video ``i``, and each caption and each
    video is a query. With several captions, each caption is a query for the videos. Each video is a
    query for the videos too: the similarity of a video is the largest similarity of its captions.

    Args:
        similarities: ``[texts, videos]``. Minus infinity is allowed, such as for a video that can't
            be read.
        captions_per_video: the number of captions of each video. The captions of the first video
            are the first rows, and so on. Default: one caption for each video.

    Returns:
        ``{"text_to_video": {"R1", "R5", "R10", "MedianR", "MeanR"}, "video_to_text": {...}}``. R1,
        R5 and R10 are percentages of the queries whose rank is at most 1, 5 and 10. MedianR is the
        median rank: between two ranks it is their mean. For ``text_to_video`` with
        ``captions_per_video``, the released code takes the lower rank and computes the percentages
        in float32, and so does this function.

    Raises:
        EvaluationError: ``similarities`` is no matrix, is empty or holds NaN, or the numbers of
            captions do not fit the matrix.

    Source: the released code of CLIP4Clip.

    Example:
        >>> retrieval_metrics(torch.tensor([[0.9, 0.1], [0.8, 0.2]]))["text_to_video"]["R1"]
        50.0
    """
    matrix = _matrix(similarities)
    if captions_per_video is None:
        texts, videos = matrix.shape
        if texts != videos:
            raise EvaluationError(
                f"similarities is {list(matrix.shape)}; expected as many texts as videos. For "
                "several captions of a video, give captions_per_video."
            )
        own = matrix.diagonal()
        return {
            "text_to_video": _metrics(_ranks(matrix, own)),
            "video_to_text": _metrics(_ranks(matrix.T, own)),
        }
    counts = _counts(captions_per_video, matrix)
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(matrix.device)
    own = matrix.gather(1, owner[:, None])[:, 0]
    best = torch.stack([rows.amax(dim=0) for rows in matrix.split(counts)])  # [captions of, video]
    return {
        "text_to_video": _metrics_of_captions(_ranks(matrix, own)),
        "video_to_text": _metrics(_ranks(best.T, best.diagonal())),
    }


def dual_softmax(similarities: Tensor | np.ndarray[Any, Any]) -> Tensor:
    """Return similarities that are weighed with their softmax over the texts.

    A text that fits many videos then counts less. The weights use all texts of the test set at
    once, which a search for a single sentence does not have. So results with the dual softmax are
    not comparable with results without it, and belong into a table of their own.

    Args:
        similarities: ``[texts, videos]``, multiplied with the scale of the model: cosines alone
            give weights that are nearly equal.

    Returns:
        ``similarities * softmax(similarities, dim=0)``, ``[texts, videos]``. Use it for both
        directions.

    Raises:
        EvaluationError: ``similarities`` is no matrix, is empty or holds NaN, or holds infinity.
    """
    matrix = _matrix(similarities)
    if not matrix.isfinite().all():
        raise EvaluationError(
            "similarities holds infinity, for which there is no softmax. Leave the videos out that "
            "can't be read."
        )
    return matrix * matrix.softmax(dim=0)


def _matrix(similarities: Any) -> Tensor:
    matrix = torch.as_tensor(similarities).detach()
    if matrix.ndim != 2 or 0 in matrix.shape or matrix.is_complex():
        raise EvaluationError(
            f"similarities is {matrix.dtype} {list(matrix.shape)}; expected numbers [texts, videos]"
            " with at least one text and one video."
        )
    if matrix.dtype not in (torch.float32, torch.float64):
        matrix = matrix.double()
    missing = matrix.isnan()
    if missing.any():
        text, video = (int(index) for index in missing.nonzero()[0])
        raise EvaluationError(
            f"similarities holds {int(missing.sum())} NaN, the first for text {text} and video "
            f"{video}. A rank among NaN has no meaning: check the weights of the model."
        )
    return matrix


def _counts(captions_per_video: Any, matrix: Tensor) -> list[int]:
    """Return the number of captions of each video."""
    texts, videos = matrix.shape
    counts = torch.as_tensor(captions_per_video)
    whole = not (counts.is_floating_point() or counts.dtype == torch.bool)
    if counts.ndim != 1 or not whole or bool((counts < 1).any()):
        shown = listed([str(count) for count in counts.flatten().tolist()], 10)
        raise EvaluationError(
            f"captions_per_video is [{shown}]; expected a whole number of at least 1 for each "
            "video. Leave the videos without captions out."
        )
    if len(counts) != videos or int(counts.sum()) != texts:
        raise EvaluationError(
            f"captions_per_video has {len(counts)} videos and {int(counts.sum())} captions; "
            f"similarities has {videos} videos and {texts} texts."
        )
    return [int(count) for count in counts]


def _ranks(scores: Tensor, own: Tensor) -> Tensor:
    """Return the rank of the right candidate in each row: ties count against the model."""
    return (scores >= own[:, None]).sum(dim=1).cpu()


def _metrics(ranks: Tensor) -> dict[str, float]:
    n = len(ranks)
    recalls = {f"R{k}": 100 * int((ranks <= k).sum()) / n for k in RECALLS}
    return {**recalls, "MedianR": float(np.median(ranks.numpy())), "MeanR": int(ranks.sum()) / n}


def _metrics_of_captions(ranks: Tensor) -> dict[str, float]:
    """Return the metrics as the released code rounds them: float32, and the lower median."""
    recalls = {f"R{k}": float((ranks <= k).sum() * 100 / len(ranks)) for k in RECALLS}
    mean = int(ranks.sum()) / len(ranks)
    return {**recalls, "MedianR": float(ranks.median()), "MeanR": mean}
