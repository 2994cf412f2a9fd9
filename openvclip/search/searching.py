"""Search an index: queries in, moments out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from openvclip.checkpoints.contract import Confidence
from openvclip.errors import SearchError
from openvclip.models.confidence import DEFAULT_SCORE
from openvclip.search.moments import Moment, SearchedWindows, find_moments
from openvclip.search.queries import Query, QueryEncoder, as_queries, is_sentence, query_text

if TYPE_CHECKING:
    from openvclip.search.index import Index

__all__ = ["SearchResult", "calibrated_threshold", "search_index"]


@dataclass(frozen=True)
class SearchResult:
    """The moments of a query.

    Attributes:
        query: the query in words.
        moments: the moments, best first.
        min_score: the lowest score of a moment, ``None`` if there was no limit.
        best: the score of the best moment of the index, also if it is below ``min_score``; ``None``
            if the index has no windows, or all windows are more similar to a negative query.
        windows: number of windows of the index.
    """

    query: str
    moments: list[Moment]
    min_score: float | None
    best: float | None
    windows: int

    def reason(self) -> str:
        """Return why there are no moments, ``""`` if there are some."""
        if self.moments:
            return ""
        if not self.windows:
            return "nothing fits: the index has no videos"
        if self.best is None:
            return "nothing fits: every window is more similar to a negative query"
        return (
            f"nothing fits: the best moment has the score {self.best:.3f}, below {self.min_score:g}"
        )


def calibrated_threshold(confidence: Confidence | None) -> float | None:
    """Return the threshold of a calibration if it is one for cosines, the scores of moments.

    Args:
        confidence: the calibration of the model of an index, or ``None``.
    """
    if confidence is None or (confidence.score or DEFAULT_SCORE) != "cosine":
        return None
    return confidence.threshold


def search_index(
    index: Index,
    query: Query | list[Query],
    k: int = 10,
    *,
    negative: Query | Iterable[Query] = (),
    min_score: float | None = None,
) -> list[SearchResult]:
    """Return the best moments of an index for one or several queries, and why there are none.

    Args:
        index: the index.
        query: see :meth:`openvclip.search.Index.search`.
        k: see :meth:`openvclip.search.Index.search`.
        negative: see :meth:`openvclip.search.Index.search`.
        min_score: see :meth:`openvclip.search.Index.search`.

    Returns:
        A result for each query.

    Raises:
        OpenVCLIPError: see :meth:`openvclip.search.Index.search`.
    """
    _require_numbers(k, min_score)
    queries, _ = as_queries(query)
    unwanted = _unwanted(negative)
    encoder = QueryEncoder(lambda: index.model, index.window_settings)
    vectors = [encoder.vectors(one, unwanted) for one in queries]
    limits = [_limit(lambda: index.model.confidence, one, min_score) for one in queries]
    windows: Any = index.snapshot()
    results = []
    for one, found, limit in zip(queries, _find(windows, vectors, k, limits), limits, strict=True):
        moments, best = found
        results.append(SearchResult(query_text(one), moments, limit, best, windows.count))
    return results


def _find(
    windows: SearchedWindows, vectors: list[Any], k: int, limits: list[float | None]
) -> list[tuple[list[Moment], float | None]]:
    """Return the moments of each query, and the score of the best."""
    found = []
    for all_moments, limit in zip(find_moments(windows, vectors, k), limits, strict=True):
        best = all_moments[0].score if all_moments else None
        # A limit does not change the moments above it.
        moments = [m for m in all_moments if limit is None or m.score >= limit]
        found.append((moments, best))
    return found


def _limit(
    confidence: Callable[[], Confidence | None], query: Query, min_score: float | None
) -> float | None:
    """Return the lowest score of a moment.

    The calibrated threshold belongs to cosines of texts and videos. Two images or videos have much
    higher cosines.
    """
    if min_score is not None or not is_sentence(query):
        return min_score
    return calibrated_threshold(confidence())


def _unwanted(negative: Any) -> list[Query]:
    if _is_one(negative):
        return [negative]
    several = negative if isinstance(negative, (list, tuple)) else list(negative)
    return as_queries(several)[0] if several else []


def _is_one(negative: Any) -> bool:
    """Return whether an object that is no list and no tuple is one query."""
    if isinstance(negative, (np.ndarray, Tensor)):
        has_numbers = isinstance(negative, Tensor) or negative.dtype.kind in "fiu"
        return has_numbers and negative.ndim != 2  # [N, D] is several vectors
    is_file = isinstance(negative, (bytes, bytearray, memoryview)) or hasattr(negative, "read")
    return isinstance(negative, str) or is_file or not isinstance(negative, Iterable)


def _require_numbers(k: Any, min_score: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
        raise SearchError(f"k={k!r}: expected the number of moments, a whole number of at least 1.")
    if min_score is None:
        return
    if not isinstance(min_score, Real) or not -1 <= float(min_score) <= 1:
        raise SearchError(
            f"min_score={min_score!r}: expected a number from -1 to 1, which is compared with the "
            "cosine of the query and a window."
        )
