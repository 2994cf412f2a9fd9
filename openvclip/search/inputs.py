"""The videos that a caller names, and the states of their files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from openvclip.errors import MissingDependencyError, SearchError, VideoError, VideoNotFoundError
from openvclip.models.reading import is_image
from openvclip.search.changes import FileState
from openvclip.video.files import video_paths
from openvclip.video.sources import is_url

__all__ = ["VideoPaths", "file_state", "named_videos", "require_video", "whole_name"]

VideoPaths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""A file, a folder, a pattern such as ``"clips/**/*.mp4"`` or a URL; or several of them."""


def named_videos(videos: VideoPaths) -> tuple[list[str], dict[str, str]]:
    """Return the videos that the arguments name, and what can't be found.

    Args:
        videos: see :data:`VideoPaths`.

    Returns:
        Absolute paths and URLs, each once; and a reason for each argument without a video.

    Raises:
        SearchError: an argument is neither a text nor a path.
    """
    found: dict[str, None] = {}
    failed: dict[str, str] = {}
    for argument in as_list(videos):
        try:
            found.update(dict.fromkeys(map(whole_name, video_paths(argument))))
        except VideoError as error:
            failed[argument] = str(error)
    return list(found), failed


def as_list(videos: VideoPaths) -> list[str]:
    """Return the arguments as texts.

    Raises:
        SearchError: an argument is neither a text nor a path.
    """
    given: Any = videos
    is_list = isinstance(given, Iterable) and not isinstance(given, (str, bytes, os.PathLike))
    names = []
    for video in given if is_list else [given]:
        name = os.fspath(video) if isinstance(video, (str, os.PathLike)) else None
        if not isinstance(name, str):
            raise SearchError(
                f"videos holds a {type(video).__name__}; expected files, folders, patterns or "
                "URLs. An index finds a video again by its path."
            )
        names.append(name)
    return names


def whole_name(path: str) -> str:
    """Return the name of a video in an index: its absolute path, or its URL."""
    return path if is_url(path) else os.path.abspath(path)


def require_video(path: str) -> None:
    """Check that a path is not an image.

    Raises:
        VideoError: it is one.
    """
    if is_image(path):
        raise VideoError(f"{path}: is an image; an index holds videos. Leave it out.")


def file_state(path: str) -> FileState:
    """Return the size of a video and the time of its last change.

    Args:
        path: a path or a URL. The size and the time of a URL are known if its server tells them.

    Raises:
        VideoNotFoundError: there is no such file.
        VideoError: the file can't be accessed.
        MissingDependencyError: fsspec is needed and not installed.
    """
    if is_url(path):
        return _state_of_url(path)
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoNotFoundError(f"{path}: no such file.") from error
    except (OSError, ValueError) as error:
        raise VideoError(f"{path}: cannot be opened ({error}).") from error
    return FileState(found.st_size, found.st_mtime_ns)


def _state_of_url(url: str) -> FileState:
    try:
        import fsspec
    except ImportError as error:
        raise MissingDependencyError(
            f"{url}: URLs are opened with fsspec, which is not installed: pip install fsspec."
        ) from error
    try:
        system, path = fsspec.core.url_to_fs(url)
        size = system.info(path).get("size")
    except FileNotFoundError as error:
        if _is_unreachable(url, error):
            raise VideoError(f"{url}: can't be reached ({error.__cause__!r}).") from error
        raise VideoNotFoundError(f"{url}: no such file.") from error
    except Exception as error:  # the errors of a file system have any class
        reason = str(error) or type(error).__name__
        raise VideoError(f"{url}: fsspec can't open it ({reason}).") from error
    try:
        changed = int(system.modified(path).timestamp() * 1e9)
    except Exception:  # many file systems know no time
        changed = None
    return FileState(None if size is None else int(size), changed)


def _is_unreachable(url: str, error: FileNotFoundError) -> bool:
    """Return whether a web server did not say that the file is gone.

    For the web, fsspec raises FileNotFoundError for every failure, also without a connection.
    """
    is_web = url.rpartition("::")[2].lower().startswith(("http://", "https://"))
    cause = error.__cause__
    return is_web and cause is not None and getattr(cause, "status", None) not in (404, 410)
