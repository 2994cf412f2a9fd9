"""Read the captions of videos, in the formats in which the retrieval data sets are published."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from openvclip.errors import AnnotationError, listed
from openvclip.video._safe_pickle import plain_data
from openvclip.video.files import VIDEO_SUFFIXES, find_videos
from openvclip.video.lists import read_bytes, read_lines, read_text

__all__ = ["Captions", "locate_captioned", "read_captions", "read_video_names", "video_name"]

Captions = dict[str, list[str]]
"""The captions of each video, by the name of the video."""

_EXPECTED = (
    "the captions of videos: a table with the columns video_id and caption, JSON, or the "
    "raw-captions.pkl of MSVD"
)
_VIDEO_KEYS = (
    *("video_id", "video", "video_name", "videoid", "clip_id", "clip", "clip_name", "youtube_id"),
    *("video_path", "path", "file_name", "filename", "file", "image_id", "id", "name"),
)
_CAPTION_KEYS = (
    *("sentence", "caption", "captions", "sentences", "description", "descriptions"),
    *("text", "query", "title"),
)
_PICKLES = (".pkl", ".pickle")


def read_captions(path: str | os.PathLike[str]) -> Captions:
    """Read the captions of videos.

    The format is recognised from the file:

    - a table with a header (CSV, TSV or semicolons), one caption in a row. The columns of the video
      and the caption are ``video_id`` and ``sentence``, or other usual names such as ``video`` and
      ``caption``; further columns are ignored. ``MSRVTT_JSFUSION_test.csv`` is such a table.
    - a table with tabs and without a header: the first field is the video, the last field is the
      caption, as in the files of LSMDC.
    - a table with commas and without a header: the path of a video file and a caption.
    - JSON: a list of objects with a video and a caption (DiDeMo, and MSR-VTT as many copies have
      it), the object with ``sentences`` of MSR-VTT, or an object with an entry for each video
      (ActivityNet Captions). JSON Lines are read too.
    - ``raw-captions.pkl`` of MSVD: a pickle of a dict from videos to lists of captions, each a text
      or a list of words. Only plain data is read. A pickle that could run code is refused.

    Args:
        path: the file, UTF-8 unless it is a pickle.

    Returns:
        The captions of each video, in the order of the file. The keys are the names in the file.

    Raises:
        AnnotationError: the file can't be read, has another format, or holds no captions.
    """
    file = os.fspath(path)
    if os.path.splitext(file)[1].lower() in _PICKLES:
        pairs: Iterable[tuple[str, str]] = _of_mapping(
            plain_data(read_bytes(file, _EXPECTED), file, _EXPECTED), file
        )
    else:
        text = read_text(file, _EXPECTED).lstrip("\ufeff")
        is_json = text.lstrip()[:1] in ("{", "[")
        pairs = _of_json(text, file) if is_json else _of_table(text, file)
    captions: Captions = {}
    for video, caption in pairs:
        captions.setdefault(video, []).append(" ".join(caption.split()))
    if not captions:
        raise AnnotationError(f"{file}: holds no captions; expected {_EXPECTED}.")
    return captions


def video_name(path: str) -> str:
    """Return the name of a video without folder and extension.

    Only the extensions of video files are removed: the names of LSMDC have points.
    """
    name = os.path.basename(path)
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in VIDEO_SUFFIXES else name


def read_video_names(path: str) -> list[str]:
    """Return the videos of a list: one on each line, or JSON with a list or an object of them.

    Raises:
        AnnotationError: the file can't be read or names no videos.
    """
    expected = "a list of videos, one on each line"
    lines = [line.text for line in read_lines(path, expected) if line.text]
    if lines and lines[0][0] in "[{":
        content = _loaded("\n".join(lines), path)
        lines = [name for name in content if isinstance(name, str)]
    if not lines:
        raise AnnotationError(f"{path}: names no videos; expected {expected}.")
    return list(dict.fromkeys(lines))


def locate_captioned(
    videos: Sequence[str], root: str | os.PathLike[str], *, prefix: str = ""
) -> list[str]:
    """Find the files of videos in a folder.

    A path that exists is kept. Any other name is replaced by the video file with this name in any
    subfolder and with any extension of a video. A video without a file keeps its name.

    Args:
        videos: names or paths of videos, with or without an extension.
        root: the folder of the videos.
        prefix: the beginning of names that files can lack, such as ``"v_"`` for ActivityNet.

    Returns:
        Paths relative to ``root``, in the order of ``videos``.

    Raises:
        VideoNotFoundError: the folder ``root`` does not exist.
    """
    files = find_videos(root)
    by_name: dict[str, list[str]] = {}
    for path in files:
        by_name.setdefault(video_name(path), []).append(path)
    normal = [os.path.normpath(video) for video in videos]
    exact = set(files) & set(normal)
    taken = set(exact)

    def located(video: str) -> str:
        name = video_name(video)
        candidates = by_name.get(name) or by_name.get(name.removeprefix(prefix)) or []
        # A file is the file of one video: the same name in another folder can be another video.
        path = next((path for path in candidates if path not in taken), video)
        taken.add(path)
        return path

    return [path if path in exact else located(path) for path in normal]


# --- tables ------------------------------------------------------------------------------------


def _of_table(text: str, path: str) -> Iterator[tuple[str, str]]:
    first = text.strip("\n").partition("\n")[0]
    for separator in ("\t", ",", ";"):
        titles = [_key(field) for field in _split(first, separator, path)]
        columns = _columns(titles)
        if columns is not None:
            yield from _rows(text, separator, columns, path)
            return
    fields = _split(first, ",", path)
    if len(fields) == 2 and os.path.splitext(fields[0].strip())[1].lower() in VIDEO_SUFFIXES:
        yield from _rows("path,caption\n" + text.strip("\n"), ",", (0, 1), path, before=1)
        return
    if "\t" not in first:
        raise AnnotationError(
            f"{path}: the first line {first[:80]!r} names no columns of videos and captions; "
            f"expected a header with {_VIDEO_KEYS[0]} and {_CAPTION_KEYS[0]}, or lines with the "
            "video first and the caption last, separated by tabs."
        )
    for number, line in enumerate(text.split("\n"), 1):
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) > 1 and fields[0] and fields[-1]:
            yield fields[0], fields[-1]
        elif line.strip():
            raise _row_error(path, number, line)


def _rows(
    text: str, separator: str, columns: tuple[int, int], path: str, *, before: int = 0
) -> Iterator[tuple[str, str]]:
    """Yield the pairs below a header. ``before`` lines of the text are not in the file."""
    file = io.StringIO(text.strip("\n"))  # a caption in quotes can have several lines
    reader = csv.reader(file, delimiter=separator, skipinitialspace=True)
    try:
        next(reader)
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            values = [fields[i].strip() if i < len(fields) else "" for i in columns]
            if not all(values):
                raise _row_error(path, reader.line_num - before, separator.join(fields))
            yield values[0], values[1]
    except csv.Error as error:
        raise AnnotationError(f"{path}, line {reader.line_num - before}: {error}.") from error


def _split(line: str, separator: str, path: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
    except csv.Error as error:
        raise AnnotationError(f"{path}, line 1: {error} in {line[:80]!r}.") from error


def _columns(titles: Sequence[str]) -> tuple[int, int] | None:
    videos = [titles.index(key) for key in _VIDEO_KEYS if key in titles]
    captions = [titles.index(key) for key in _CAPTION_KEYS if key in titles]
    return (videos[0], captions[0]) if videos and captions else None


def _key(title: str) -> str:
    return re.sub(r"[\s-]+", "_", title.strip().casefold())


def _row_error(path: str, line: int, text: str) -> AnnotationError:
    return AnnotationError(f"{path}, line {line}: {text[:80]!r} lacks the video or the caption.")


# --- JSON and pickles --------------------------------------------------------------------------


def _of_json(text: str, path: str) -> Iterable[tuple[str, str]]:
    content = _loaded(text, path)
    if isinstance(content, dict):
        for key in ("sentences", "annotations"):
            if isinstance(content.get(key), list):
                content = content[key]
                break
    if isinstance(content, dict) and _entry(content) is None:
        return _of_mapping(content, path)
    return _of_entries([content] if isinstance(content, dict) else content, path)


def _loaded(text: str, path: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.split("\n") if line.strip()]
        try:
            return [json.loads(line) for line in lines]  # JSON Lines
        except (ValueError, RecursionError):
            raise AnnotationError(
                f"{path}: is not JSON ({error}); expected {_EXPECTED}."
            ) from error


def _of_entries(entries: Sequence[Any], path: str) -> Iterator[tuple[str, str]]:
    for number, entry in enumerate(entries, 1):
        pair = _entry(entry) if isinstance(entry, dict) else None
        if pair is None:
            raise AnnotationError(
                f"{path}, entry {number}: {_shown(entry)} has no video and caption; expected an "
                f"object such as {{{_VIDEO_KEYS[0]!r}: ..., {_CAPTION_KEYS[1]!r}: ...}}."
            )
        video, captions = pair
        for caption in _texts(captions, f"{path}, entry {number}"):
            yield str(video), caption


def _entry(entry: dict[str, Any]) -> tuple[Any, Any] | None:
    """Return the video and the captions of an object, or ``None`` if it has no such entries."""
    keys = list(entry)
    titles = [_key(key) if isinstance(key, str) else "" for key in keys]
    columns = _columns(titles)
    if columns is None:
        return None
    video, captions = (entry[keys[i]] for i in columns)
    return (video, captions) if isinstance(video, (str, int)) else None


def _of_mapping(content: Any, path: str) -> Iterator[tuple[str, str]]:
    if not isinstance(content, dict):
        raise AnnotationError(f"{path}: holds {_shown(content)}; expected {_EXPECTED}.")
    for video, value in content.items():
        captions = value
        if isinstance(value, dict):
            captions = next((value[key] for key in _CAPTION_KEYS if key in value), None)
        for caption in _texts(captions, f"{path}, {video}"):
            yield _as_text(video), caption


def _texts(captions: Any, place: str) -> list[str]:
    """Return the captions of a video: a text, or a list of texts or of lists of words."""
    several = [captions] if isinstance(captions, (str, bytes)) else captions
    if not isinstance(several, (list, tuple)):
        raise AnnotationError(
            f"{place}: {_shown(captions)}; expected a caption or a list of captions."
        )
    texts = []
    for caption in several:
        words = [caption] if isinstance(caption, (str, bytes)) else caption
        if not isinstance(words, (list, tuple)) or not all(
            isinstance(word, (str, bytes, int, float)) for word in words
        ):
            raise AnnotationError(f"{place}: {_shown(caption)}; expected a text or its words.")
        texts.append(" ".join(map(_as_text, words)))
    return texts


def _as_text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with {listed([str(key) for key in value]) or 'no entries'}"
    return f"{type(value).__name__} {str(value)[:60]!r}"
