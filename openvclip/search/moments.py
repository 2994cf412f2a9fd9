"""The results of a search: parts of videos."""

from __future__ import annotations

from typing import NamedTuple


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
