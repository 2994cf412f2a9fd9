"""Search a folder for video files."""

from __future__ import annotations

import os

from openvclip.errors import VideoError, VideoNotFoundError, near_path

__all__ = ["VIDEO_SUFFIXES", "find_videos"]

# fmt: off
VIDEO_SUFFIXES: frozenset[str] = frozenset({
    ".3gp", ".asf", ".avi", ".divx", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv",
})
# fmt: on
"""The file name extensions, in lower case, that :func:`find_videos` searches for."""


def find_videos(folder: str | os.PathLike[str]) -> list[str]:
    """Return the video files in a folder and its subfolders.

    Video files are recognised by their file name extension. Hidden files are skipped. Symbolic
    links to folders are followed; each folder is read once.

    Args:
        folder: the folder to search.

    Returns:
        Paths relative to ``folder``, sorted.

    Raises:
        VideoNotFoundError: the folder does not exist.
        VideoError: the folder or a subfolder cannot be listed.
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise VideoNotFoundError(f"{root}: no such folder of videos{near_path(root)}.")
    videos: list[str] = []
    visited: set[str] = set()
    for current, subfolders, files in os.walk(root, onerror=_refuse, followlinks=True):
        real = os.path.realpath(current)
        if real in visited:  # a link to a parent folder
            subfolders.clear()
            continue
        visited.add(real)
        relative = os.path.relpath(current, root)
        videos.extend(
            os.path.normpath(os.path.join(relative, name))
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES
        )
    return sorted(videos)


def _refuse(error: OSError) -> None:
    raise VideoError(
        f"{error.filename}: can't be listed ({error.strerror}); change the folder's mode."
    ) from error
