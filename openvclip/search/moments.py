"""The results of a search: moments, which are found in the scores of windows.

Windows overlap, so one event is a hit of several windows. :func:`find_moments` makes one result of
them. The moments of a query are defined without a number of results:

1. The window with the highest score is a *peak*. Of equal scores, the first path and then the
   earliest start come first.
2. The moment of a peak are the windows around it, of the same video, that overlap or touch each
   other and have at least :data:`SHARE` of the score of the peak.
3. The windows of the moment and all windows that overlap it are put aside. Step 1 follows, with the
   other windows.

The first ``k`` moments are therefore the same for every ``k``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from openvclip.search.scoring import (
    ApproximateScores,
    Floats,
    VectorBlock,
    approximate_scores,
    exact_scores,
)

__all__ = ["SHARE", "Moment", "SearchedWindows", "find_moments"]

SHARE = 0.9
"""Share of the score of a peak that a neighbouring window needs to belong to the moment."""

TOUCH = 1e-3
"""Seconds. Two windows touch if the gap is at most this long, and overlap if they share more."""

_FIRST = 64  # windows that are looked at first
_BUCKETS = 64  # rows of one maximum, when a bound of the best scores is sought


class Moment(NamedTuple):
    """A part of a video that fits a query.

    Attributes:
        path: the video file.
        start: seconds from the first frame of the video.
        end: seconds from the first frame of the video.
        score: the highest cosine similarity of the query and a window of this part.
        peak: seconds from the first frame of the video: the centre of this window.
    """

    path: str
    start: float
    end: float
    score: float
    peak: float


class SearchedWindows(Protocol):
    """The windows that are searched: the content of an index, or arrays."""

    @property
    def blocks(self) -> Sequence[VectorBlock]:
        """The vectors."""

    @property
    def paths(self) -> Sequence[str]:
        """The videos."""

    @property
    def video(self) -> NDArray[np.integer]:
        """Integers ``[rows]``, the place in ``paths`` of each row; negative for removed videos."""

    @property
    def start(self) -> NDArray[np.float64]:
        """float64 ``[rows]``, seconds."""

    @property
    def end(self) -> NDArray[np.float64]:
        """float64 ``[rows]``, seconds."""


def find_moments(
    windows: SearchedWindows, queries: Sequence[Floats], k: int, min_score: float | None = None
) -> list[list[Moment]]:
    """Return the best moments of each query.

    The score of a window is its cosine with the first vector of the query. If the query has more
    vectors, they are negative: a window that is at least as similar to one of them is no hit, like
    a video for which a background text of :func:`openvclip.predict` is more probable than every
    label.

    Args:
        windows: the windows to search.
        queries: for each query its vectors, float32 ``[V, D]`` with rows of unit length, such as
            :func:`openvclip.search.scoring.unit_vectors` returns.
        k: number of moments of a query. If there are fewer, all are returned.
        min_score: lowest score of a moment. It does not change start and end of a moment. Default:
            no limit.

    Returns:
        A list of :class:`Moment` for each query: descending scores, then ascending paths and times.

    Raises:
        SearchError: the length of a vector is not that of the vectors of the index.
    """
    scores = approximate_scores(windows.blocks, queries)
    return [
        _Search(windows, query, approximate).best(k, -np.inf if min_score is None else min_score)
        for query, approximate in zip(queries, scores, strict=True)
    ]


class _Search:
    """The search for the moments of a query."""

    def __init__(self, windows: SearchedWindows, query: Floats, scores: ApproximateScores) -> None:
        self._windows = windows
        self._query = query
        self._approximate = scores.values[0]
        self._error = float(scores.error.max())
        if len(scores.values) > 1:
            highest = scores.values[1:].max(axis=0)
            self._approximate[highest > self._approximate + 2 * self._error] = -np.inf

    def best(self, k: int, min_score: float) -> list[Moment]:
        """Return the first ``k`` moments whose scores are at least ``min_score``."""
        count = _FIRST + 8 * k
        while True:
            bound = self._bound(count)
            # All windows with at least this score are among those with an approximate score of
            # at least the bound.
            lowest = max(bound + self._error, min_score)
            moments = [m for m in self._moments(lowest) if m.score >= lowest]
            if len(moments) >= k or lowest == min_score or bound == -np.inf:
                moments.sort(key=lambda moment: (-moment.score, moment.path, moment.peak))
                return moments[:k]
            count *= 8

    def _bound(self, count: int) -> float:
        """Return a number that at least ``count`` approximate scores reach, ``-inf`` if all do."""
        values = self._approximate
        if len(values) > _BUCKETS * count:
            values = values[: len(values) // _BUCKETS * _BUCKETS].reshape(_BUCKETS, -1).max(axis=0)
        if len(values) <= count:
            return -np.inf
        return float(np.partition(values, len(values) - count)[-count])

    def _moments(self, lowest: float) -> Iterator[Moment]:
        """Yield all moments with a score of at least ``lowest``, and perhaps others."""
        windows = self._windows
        rows, parts = self._near_peaks(lowest)
        scores = exact_scores(windows.blocks, rows, self._query)
        own = scores[0]
        if len(scores) > 1:
            own[scores[1:].max(axis=0) >= own] = -np.inf
        start, end = windows.start[rows], windows.end[rows]
        edges = np.flatnonzero(np.diff(parts, prepend=-1, append=-1)).tolist()
        for first, last in pairwise(edges):
            path = windows.paths[int(windows.video[rows[first]])]
            yield from _moments_of(
                path, start[first:last], end[first:last], own[first:last], lowest
            )

    def _near_peaks(self, lowest: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the rows that can belong to moments with a score of at least ``lowest``.

        Returns:
            The rows, sorted by video and time, and for each row the number of its part: windows of
            a part overlap or touch each other, and no window of another part does.
        """
        windows, values = self._windows, self._approximate
        rows = np.flatnonzero(values >= max(_floor(lowest) - self._error, np.finfo(np.float32).min))
        peaks = values[rows] >= lowest - self._error
        has_peak = np.zeros(len(windows.paths), dtype=bool)
        has_peak[windows.video[rows[peaks]]] = True
        keep = has_peak[windows.video[rows]]
        rows, peaks = rows[keep], peaks[keep]
        order = np.lexsort((windows.end[rows], windows.start[rows], windows.video[rows]))
        rows, peaks = rows[order], peaks[order]
        parts = _parts(windows.video[rows], windows.start[rows], windows.end[rows])
        with_peak = np.zeros(len(rows) + 1, dtype=bool)
        with_peak[parts[peaks]] = True
        keep = with_peak[parts]
        return rows[keep], parts[keep]


def _floor(score: float) -> float:
    """Return the lowest score of a window in the moment of a peak."""
    return score - (1 - SHARE) * abs(score)


def _parts(
    video: NDArray[np.integer], start: NDArray[np.float64], end: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Number the groups of windows that overlap or touch, for rows sorted by video and start."""
    if not len(video):
        return np.zeros(0, dtype=np.int64)
    place = np.cumsum(np.diff(video, prepend=video[0]) != 0)
    shift = place * (end.max() - start.min() + 1.0)  # so that videos follow each other
    reached = np.maximum.accumulate(end + shift)
    begins = np.ones(len(video), dtype=bool)
    begins[1:] = (start + shift)[1:] > reached[:-1] + TOUCH
    return np.cumsum(begins) - 1


def _moments_of(
    path: str,
    start: NDArray[np.float64],
    end: NDArray[np.float64],
    scores: NDArray[np.float64],
    lowest: float,
) -> Iterator[Moment]:
    """Yield the moments of a part with a score of at least ``lowest``, the best first."""
    free = scores > -np.inf
    for peak in np.lexsort((end, start, -scores)).tolist():
        score = float(scores[peak])
        if score < lowest or score == -np.inf:
            return
        if not free[peak]:
            continue
        near = np.flatnonzero(free & (scores >= _floor(score)))
        part = _parts(np.zeros(len(near), dtype=np.int64), start[near], end[near])
        near = near[part == part[np.searchsorted(near, peak)]]
        begin, until = float(start[near].min()), float(end[near].max())
        yield Moment(path, begin, until, score, float(start[peak] + end[peak]) / 2)
        free &= np.minimum(end, until) - np.maximum(start, begin) <= TOUCH
        free[near] = False
