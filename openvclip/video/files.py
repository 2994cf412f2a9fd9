"""Which files of a folder are videos."""

from __future__ import annotations

import os

from openvclip.errors import VideoError, VideoNotFoundError

__all__ = ["VIDEO_SUFFIXES", "find_videos"]

# fmt: off
VIDEO_SUFFIXES: frozenset[str] = frozenset({
    ".3gp", ".asf", ".avi", ".divx", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv",
})
# fmt: on
"""The endings, in lower case, of the files that :func:`find_videos` takes for videos."""


def find_videos(folder: str | os.PathLike[str]) -> list[str]:
    """The video files in a folder and those below it, by their endings; none that is hidden.

    Links to folders are followed, each folder once.

    Returns:
        Paths relative to ``folder``, sorted.

    Raises:
        VideoNotFoundError: there is no such folder.
        VideoError: it, or one below it, can't be listed.
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise VideoNotFoundError(f"{root}: no such folder of videos.")
    found: list[str] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        below = os.path.relpath(place, root)
        found.extend(
            os.path.normpath(os.path.join(below, name))
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES
        )
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise VideoError(
        f"{error.filename}: can't be listed ({error.strerror}); change the folder's mode."
    ) from error
