"""What can be searched for: sentences, images, clips and vectors, and their vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from openvclip.errors import SearchError
from openvclip.models.reading import is_image
from openvclip.models.video_clip import VideoCLIP
from openvclip.search.building import BuildOptions, encode_windows, whole_videos
from openvclip.search.moments import Moment
from openvclip.search.scoring import Floats, unit_vectors
from openvclip.search.windows import Window, WindowSettings
from openvclip.video.excerpts import pictures_at, stream_facts
from openvclip.video.sources import source_name

__all__ = ["Clip", "Query", "QueryEncoder", "as_queries", "is_sentence", "query_text"]

_LONGEST = 5_000  # characters of a sentence; no model reads as many
_BATCH = 16  # windows of a clip that are encoded at a time


class Clip(NamedTuple):
    """A part of a video, as a query.

    Attributes:
        path: the video file, or another source that FFmpeg decodes; see
            :data:`openvclip.video.VideoSource`.
        start: seconds from the first frame of the video. Default: the start of the video.
        end: seconds from the first frame of the video. Default: the end of the video.
    """

    path: Any
    start: float | None = None
    end: float | None = None


Query: TypeAlias = Any
"""A sentence (``str``), an image, a video, a :class:`Clip`, or a vector of floats ``[D]``.

A ``str`` is always a sentence. A file is a ``pathlib.Path``: an image if its extension is that of
an image format, a video otherwise. Images of Pillow, arrays uint8 ``[H, W, C]`` and the other
sources of :data:`openvclip.video.VideoSource` are images and videos too. A
:class:`~openvclip.search.Moment` is the part of a video that it names.
"""


def as_queries(query: Query | list[Query]) -> tuple[list[Query], bool]:
    """Return queries as a list, and whether they are several.

    A list or a tuple is several queries, unless all of its elements are numbers.

    Raises:
        SearchError: there are no queries.
    """
    if isinstance(query, _PARTS) or not isinstance(query, (list, tuple)):
        return [query], False
    if not query:
        raise SearchError("The list of queries is empty; expected at least one query.")
    if all(isinstance(number, (int, float)) for number in query):
        return [query], False
    return list(query), True


def is_sentence(query: Query) -> bool:
    """Return whether a query is a sentence."""
    return isinstance(query, str)


def query_text(query: Query) -> str:
    """Return a query in words: the sentence, or what is searched for."""
    if is_sentence(query):
        return str(query)
    if isinstance(query, _PARTS):
        query = _clip_of(query)
        name = source_name(query.path)
        if query.start is None and query.end is None:
            return name
        end = "the end" if query.end is None else f"{query.end:g} s"
        return f"{name}, {query.start or 0:g} s to {end}"
    if _is_vector(query):
        return "a vector"
    return source_name(query)


_PARTS = (Clip, Moment, Window)


def _clip_of(part: Clip | Moment | Window) -> Clip:
    return Clip(part.path, part.start, part.end)


class QueryEncoder:
    """Turns queries into unit vectors.

    Args:
        model: function that returns the model of the index. It is called only if a query is no
            vector.
        windows: the windows of the index. A clip is cut into windows like them.
    """

    def __init__(self, model: Callable[[], VideoCLIP], windows: WindowSettings) -> None:
        self._model = model
        self._windows = windows

    def vectors(self, query: Query, negative: Iterable[Query] = ()) -> Floats:
        """Return the vector of a query, followed by those of what it must not be.

        Args:
            query: the query. The feature of a sentence is that of the sentence as it is, without
                templates. The vector of a video is the mean of the vectors of its windows.
            negative: other queries, such as sentences.

        Returns:
            float32 ``[1 + N, D]``, rows of unit length.

        Raises:
            SearchError: a sentence is empty or longer than the model reads; or a part of a video
                is empty or after its end; or a vector is zero or has another shape.
            VideoError, VideoNotFoundError, VideoOptionError, VideoShapeError, UsageError: an image
                or a video can't be read.
        """
        rows = [unit_vectors(self._vector(one)) for one in (query, *negative)]
        widths = sorted({row.shape[1] for row in rows})
        if any(len(row) != 1 for row in rows) or len(widths) > 1:
            raise SearchError(
                f"The vectors of a query have the shapes {[list(row.shape) for row in rows][:10]}; "
                "expected [D] for each. Several queries are a list."
            )
        return np.concatenate(rows)

    def _vector(self, query: Query) -> Any:
        if is_sentence(query):
            return self._of_sentence(query)
        if _is_vector(query):
            return query
        if isinstance(query, _PARTS):
            return self._of_clip(_clip_of(query))
        if is_image(query):
            return self._model().encode_image(query)
        return self._of_video(query)

    def _of_sentence(self, sentence: str) -> Tensor:
        if not sentence.strip():
            raise SearchError("A sentence is empty; expected what the moments show.")
        if len(sentence) > _LONGEST:  # before the tokenizer, which is slow with a whole book
            raise SearchError(
                f"The sentence {sentence[:60]!r}... has {len(sentence)} characters; expected at "
                f"most {_LONGEST}. Shorten it, or search for several sentences."
            )
        model = self._model()
        left_out = model.tokens_left_out(sentence)
        if left_out:
            raise SearchError(
                f"The sentence {sentence[:60]!r}... is too long: the model does not read its last "
                f"{left_out} tokens. Shorten it, or search for several sentences."
            )
        return model.encode_text(sentence)

    def _of_video(self, video: Any) -> Any:
        events = encode_windows(self._model(), [video], self._windows, BuildOptions(_BATCH, 0))
        (encoded,) = whole_videos(events)
        if encoded.error is not None:
            # The reader says more about the error: its class, and what to do.
            self._model().encode_video(video)
            raise SearchError(f"The query can't be read: {encoded.error}")
        return encoded.vectors.astype(np.float64).mean(axis=0)

    def _of_clip(self, clip: Clip) -> Any:
        if clip.start is None and clip.end is None:
            return self._of_video(clip.path)
        start, end = _checked_part(clip)
        count = max(1, round((end - start) / self._windows.seconds))
        model, frames = self._model(), self._windows.num_frames
        transform = model.transform.with_(crops=1)
        times = [start + i * (end - start) / (count * frames) for i in range(count * frames)]
        pictures = pictures_at(clip.path, times)
        total = torch.zeros((), dtype=torch.float64)
        for windows in _batches(pictures, frames, count, transform):
            total = total + model.encode_clips(windows).cpu().double().sum(dim=0)
        return total


def _batches(
    pictures: Iterator[Any], frames: int, count: int, transform: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """Yield the frames of windows that follow each other, ``[n, T, C, H, W]``."""
    for begin in range(0, count, _BATCH):
        size = min(_BATCH, count - begin)
        rows = [
            transform(torch.from_numpy(next(pictures).pixels.copy()).movedim(-1, 0)[None])[0]
            for _ in range(size * frames)
        ]
        yield torch.stack(rows).unflatten(0, (size, frames))


def _checked_part(clip: Clip) -> tuple[float, float]:
    """Return start and end of a part of a video."""
    name = source_name(clip.path)
    try:
        start = 0.0 if clip.start is None else float(clip.start)
        end = math.inf if clip.end is None else float(clip.end)
    except (TypeError, ValueError):
        start = end = math.nan
    if not 0 <= start < end:
        raise SearchError(
            f"{name}: start={clip.start!r}, end={clip.end!r}; expected seconds from the first "
            "frame of the video, and an end after the start."
        )
    length = stream_facts(clip.path).seconds
    if length is not None and start >= length:
        raise SearchError(
            f"{name}: start={start:g}, but the video has {length:.1f} seconds. Give an earlier "
            "start."
        )
    end = end if length is None else min(end, length)
    if math.isinf(end):
        raise SearchError(f"{name}: the length of the video is not known. Give the end, too.")
    return start, end


def _is_vector(query: Any) -> bool:
    if isinstance(query, Tensor):
        return query.is_floating_point()
    if isinstance(query, np.ndarray):
        return bool(np.issubdtype(query.dtype, np.floating))
    return isinstance(query, (list, tuple)) and not isinstance(query, _PARTS)
