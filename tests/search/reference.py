"""An independent, slow search: loops over all windows, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from openvclip.search.moments import Moment

TOUCH = 1e-3


class Rows(NamedTuple):
    """A block of vectors."""

    first_row: int
    vectors: Any
    live: Any


@dataclass
class Library:
    """Windows of videos in memory."""

    blocks: list[Rows]
    paths: list[str]
    video: np.ndarray
    start: np.ndarray
    end: np.ndarray


def slow_moments(library: Library, query: np.ndarray, min_score: float = -np.inf) -> list[Moment]:
    """All moments of a query ``[V, D]``, as docs/search.md defines them."""
    vectors = np.concatenate([np.asarray(block.vectors, np.float64) for block in library.blocks])
    hits = []
    for row, video in enumerate(library.video):
        if video < 0:
            continue
        cosines = [
            min(1.0, max(-1.0, float((vectors[row] * one.astype(np.float64)).sum())))
            for one in query
        ]
        if all(cosines[0] > other for other in cosines[1:]):
            times = float(library.start[row]), float(library.end[row])
            hits.append((cosines[0], library.paths[video], *times))
    hits.sort(key=lambda hit: (-hit[0], *hit[1:]))
    moments = []
    while hits:
        score, path, start, end = hits[0]
        middle = (start + end) / 2
        limit = score - 0.1 * abs(score)
        members = {0}
        grown = True
        while grown:
            grown = False
            for i, (other, where, begin, until) in enumerate(hits):
                touches = begin <= end + TOUCH and until >= start - TOUCH
                if i not in members and where == path and other >= limit and touches:
                    members.add(i)
                    start, end = min(start, begin), max(end, until)
                    grown = True
        moments.append(Moment(path, start, end, score, middle))
        hits = [
            hit
            for i, hit in enumerate(hits)
            if i not in members
            and (hit[1] != path or min(hit[3], end) - max(hit[2], start) <= TOUCH)
        ]
    return [moment for moment in moments if moment.score >= min_score]
