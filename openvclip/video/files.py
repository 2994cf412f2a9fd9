"""The video files of a folder, and those that the arguments of a command name."""

from __future__ import annotations

import glob
import os

from openvclip.errors import VideoError, VideoNotFoundError, near_path
from openvclip.video.sources import is_url

__all__ = ["VIDEO_SUFFIXES", "find_videos", "video_paths"]

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


def video_paths(argument: str) -> list[str]:
    """Return the video files of a file, a folder or a pattern, or a URL as it is.

    Args:
        argument: a file with any extension; a folder, see :func:`find_videos`; a pattern such as
            ``"clips/**/*.mp4"``; or a URL.

    Returns:
        Paths, sorted. The paths of a relative argument are relative.

    Raises:
        VideoNotFoundError: there is no such file or folder, the folder has no video files, or no
            file matches the pattern.
        VideoError: a folder cannot be listed.
    """
    if is_url(argument):
        return [argument]
    if os.path.isdir(argument):
        files = [os.path.join(argument, path) for path in find_videos(argument)]
        if not files:
            raise VideoNotFoundError(
                f"{argument}: no video files in this folder or its subfolders."
            )
        return files
    if os.path.exists(argument):
        return [argument]
    if glob.has_magic(argument):
        files = [path for path in glob.glob(argument, recursive=True) if os.path.isfile(path)]
        if not files:
            raise VideoNotFoundError(f"{argument}: no file matches this pattern.")
        return sorted(files)
    raise VideoNotFoundError(
        f"{argument}: no such file{near_path(argument)}; expected a file, folder or pattern."
    )


def _refuse(error: OSError) -> None:
    raise VideoError(
        f"{error.filename}: can't be listed ({error.strerror}); change the folder's mode."
    ) from error
