"""What the app answers to a search and to a clip with labels: HTML, also if something is wrong."""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any, ParamSpec

from openvclip.commands.names import one_line
from openvclip.errors import OpenVCLIPError, SearchError, VideoError
from openvclip.models.timeline import clock
from openvclip.search.app.media import MediaFiles
from openvclip.search.app.player import clip_view
from openvclip.search.cards import cards, display_name
from openvclip.search.index import Index
from openvclip.search.page import count_of
from openvclip.search.searching import search_index
from openvclip.video.checking import VideoChecker
from openvclip.video.excerpts import stream_facts

__all__ = ["Answers", "Limits"]

_LONGEST_TEXT = 1000  # letters of a query
_MOST_LABELS = 200
_MOST_NEGATIVE = 50  # sentences; each is encoded and compared with all windows
_START = 60.0  # seconds beyond the length of a clip in which it is decoded
_NEAREST = 5  # names that an error lists
_log = logging.getLogger(__name__)
P = ParamSpec("P")


@dataclass(frozen=True)
class Limits:
    """The limits of the app.

    Attributes:
        upload_bytes: the greatest size of an upload, in bytes.
        clip_seconds: the greatest length of a clip with labels, in seconds.
        results: the greatest number of results.

    Raises:
        SearchError: a limit is not above 0.
    """

    upload_bytes: int = 200 * 2**20
    clip_seconds: float = 600.0
    results: int = 100

    def __post_init__(self) -> None:
        for name in ("upload_bytes", "clip_seconds", "results"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise SearchError(f"{name}={value!r}: expected a number above 0.")


def _as_html(answer: Callable[P, str]) -> Callable[P, str]:
    """Turn the errors of an answer into HTML, so that no input ends the server."""

    @functools.wraps(answer)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> str:
        try:
            return answer(*args, **kwargs)
        except OpenVCLIPError as error:
            return say(str(error), wrong=True)
        except Exception:
            _log.exception("an answer failed")
            return say(
                "This did not work. The terminal in which 'openvclip app' runs shows the reason.",
                wrong=True,
            )

    return wrapped


def say(text: str, wrong: bool = False) -> str:
    """Return a sentence as HTML. The text is escaped.

    Args:
        text: the sentence.
        wrong: whether the sentence is about an error.
    """
    style, role = ("ov-say ov-wrong", "alert") if wrong else ("ov-say", "status")
    text = text.encode("utf-8", "backslashreplace").decode()  # names of files can be no text
    return f'<p class="{style}" role="{role}">{escape(text)}</p>'


class Answers:
    """The answers of the app. Several threads can use one object.

    Args:
        index: the index.
        files: the files that the server may send.
        limits: the limits.
    """

    def __init__(self, index: Index, files: MediaFiles, limits: Limits) -> None:
        self._index, self._files, self._limits = index, files, limits
        self._checker = VideoChecker(timeout=_START + limits.clip_seconds)
        self._turn = threading.Lock()  # one model: two queries at a time are not faster

    def close(self) -> None:
        """End the process that decodes uploads."""
        self._checker.close()

    @_as_html
    def search(self, query: str, negative: str = "", k: float = 12, least: Any = None) -> str:
        """Return the results of a search.

        Args:
            query: the sentence.
            negative: sentences of what the moments must not show, one on each line.
            k: the number of results.
            least: the lowest score; ``None`` for the threshold of a calibrated model, or no limit.
        """
        text = " ".join(str(query or "").split())
        if not text:
            return say("Type what you are looking for, such as: a person riding a horse.")
        if len(text) > _LONGEST_TEXT:
            raise SearchError(
                f"The query has {len(text)} letters; at most {_LONGEST_TEXT} are searched."
            )
        without = [line.strip() for line in str(negative or "").splitlines() if line.strip()]
        if len(without) > _MOST_NEGATIVE:
            raise SearchError(
                f"{len(without)} sentences of what the moments must not show; at most "
                f"{_MOST_NEGATIVE} are compared."
            )
        count = max(1, min(int(k), self._limits.results))
        score = None if least is None else float(least)
        with self._turn:
            begun = time.perf_counter()
            (result,) = search_index(self._index, text, count, negative=without, min_score=score)
            took = time.perf_counter() - begun
        moments = result.moments
        if not moments:
            reason = result.reason()
            return say(f"{reason[:1].upper()}{reason[1:]}.")
        found = cards(moments, lambda _, moment: self._files.media(moment))
        return f"{say(f'{count_of(moments)}, {took:.2f} s')}{found}"

    @_as_html
    def upload(self, path: str | None, labels: str) -> str:
        """Return the probabilities and the timeline of an uploaded clip.

        Args:
            path: the uploaded file.
            labels: the labels; see :func:`labels_of`.
        """
        if not path:
            return say("Choose a clip first.")
        names = labels_of(labels)
        self._files.keep_upload(path)
        if os.path.getsize(path) > self._limits.upload_bytes:
            raise VideoError(f"The file is larger than {self._limits.upload_bytes:,} bytes.")
        self._require_readable(path)
        return self._labelled(path, names)

    @_as_html
    def from_library(self, name: str | None, labels: str) -> str:
        """Return the probabilities and the timeline of a video of the index.

        Args:
            name: the path, or a part of it that only one path has.
            labels: the labels; see :func:`labels_of`.
        """
        if not name or not name.strip():
            return say("Choose a clip first.")
        return self._labelled(self.library_path(name), labels_of(labels))

    def library_path(self, name: str) -> str:
        """Return the path of a video of the index.

        Args:
            name: the path, or a part of it that only one path has.

        Raises:
            SearchError: the index has no such video, or several.
        """
        videos = self._index.videos
        if name in videos:
            return name
        shown_names = {one_line(path): path for path in videos}
        if name in shown_names:
            return shown_names[name]
        part = name.strip().casefold()
        matching = [path for path in videos if part in path.casefold()]
        if len(matching) == 1:
            return matching[0]
        if not matching:
            raise SearchError(f"{name}: no video of the index has this name.")
        shown = ", ".join(display_name(path) for path in matching[:_NEAREST])
        raise SearchError(
            f"{name}: {len(matching)} videos of the index have this in their path, such as "
            f"{shown}. Type more of the name."
        )

    def _require_readable(self, path: str) -> None:
        """Decode an uploaded file in another process, which a damaged file can crash.

        Raises:
            VideoError: the file can't be read, or decoding takes too long.
        """
        check = self._checker.check(path)
        if check.status == "bad":
            raise VideoError(
                f"{display_name(path)} can't be read as a video. Play it in a player, or copy or "
                "convert it again."
            )

    def _labelled(self, path: str, labels: list[str]) -> str:
        seconds = stream_facts(path, measured=True).seconds or 0.0
        most = self._limits.clip_seconds
        if seconds > most:
            raise VideoError(
                f"{display_name(path)} is {clock(seconds)} long; at most {clock(most)} are "
                "labelled. Cut the clip, or start 'openvclip app' with --max-seconds."
            )
        with self._turn:
            model = self._index.model
            prediction = model.classify(path, labels, progress=False)
            timeline = model.timeline(path, labels, progress=False)
        end = float(timeline.times[-1, 1])
        return clip_view(display_name(path), self._files.whole(path, end), prediction, timeline)


def labels_of(text: str) -> list[str]:
    """Return the labels in a text: one on each line, or one line with commas.

    Raises:
        SearchError: there are fewer than two different labels, or too many.
    """
    lines = [line.strip() for line in str(text or "").splitlines()]
    lines = [line for line in lines if line]
    if len(lines) == 1:
        lines = [part.strip() for part in lines[0].split(",") if part.strip()]
    labels = list(dict.fromkeys(lines))
    if len(labels) < 2:
        raise SearchError("Give at least two different labels, one on each line.")
    if len(labels) > _MOST_LABELS:
        raise SearchError(f"{len(labels)} labels; at most {_MOST_LABELS} are compared.")
    return labels
