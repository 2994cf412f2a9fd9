"""What FFmpeg reads a video from: a file, bytes, a Python file object, a URL.

FFmpeg opens a video several times: to count its packets, or to decode it anew. So each of these
inputs can be opened any number of times, also while it is open.
"""

from __future__ import annotations

import inspect
import io
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from openvclip.errors import (
    MissingDependencyError,
    UsageError,
    VideoError,
    VideoNotFoundError,
)

__all__ = [
    "EncodedVideo",
    "SharedFile",
    "check_path",
    "is_file_object",
    "is_url",
    "member_of",
    "open_file",
    "opened_input",
]

_URL = re.compile(r"[a-z][\w+.-]+(::[a-z][\w+.-]*)*://", re.IGNORECASE)
_SILENCE = 30.0  # seconds without an answer of a web server
_COPY = "Copy or download it again."
_TAR = "tar://"


class SharedFile:
    """A file object that several readers read, each at its own position.

    Args:
        file: a seekable file object with bytes.

    Attributes:
        error: the first error of the file object, or ``None``.
    """

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: Exception | None = None

    def read(self, position: int, size: int) -> bytes:
        """Return at most ``size`` bytes from a position on, all of them if ``size`` is negative."""
        with self._noting():
            self.file.seek(position)
            data: bytes = self.file.read(size)
        return data

    def size(self) -> int:
        """Return the number of bytes in the file."""
        with self._noting():
            self.file.seek(0, os.SEEK_END)
            return int(self.file.tell())

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the errors of a file system have any class
            self.error = self.error or error
            raise OSError(f"{type(error).__name__}: {error}") from error


class _Reader(io.RawIOBase):
    """A reader of a shared file, with a position of its own."""

    def __init__(self, shared: SharedFile) -> None:
        super().__init__()
        self._shared, self._position = shared, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}
        base = start[whence] if whence in start else self._shared.size()
        self._position = max(base + offset, 0)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        data = self._shared.read(self._position, -1 if size is None else size)
        self._position += len(data)
        return data


@dataclass(frozen=True)
class EncodedVideo:
    """An encoded video, which FFmpeg decodes.

    Attributes:
        name: name of the video for error texts; for a file its absolute path.
        data: absolute path of the file, the bytes of the file, or a file object.
        format: FFmpeg's name of the container format. ``None`` lets FFmpeg find the format.
        options: options for FFmpeg.
        alone: whether this thread is the only one that decodes videos. If not, the decoder uses one
            thread.
    """

    name: str
    data: str | bytes | SharedFile
    format: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    alone: bool = True

    def opened(self) -> str | io.BytesIO | _Reader:
        """Return the path, or a new file object at the beginning of the video."""
        if isinstance(self.data, str):
            return self.data
        return io.BytesIO(self.data) if isinstance(self.data, bytes) else _Reader(self.data)

    def with_(self, **changes: Any) -> EncodedVideo:
        """Return a copy with some attributes changed."""
        return replace(self, **changes)

    def require_read(self) -> None:
        """Raise :class:`VideoError` if the file object raised an error while it was read."""
        error = self.data.error if isinstance(self.data, SharedFile) else None
        if error is not None:
            raise VideoError(
                f"{self.name}: can't be read to its end ({type(error).__name__}: {error}). Check "
                "the connection, or copy the video to this machine first."
            ) from error


def is_url(video: object) -> bool:
    """Return whether ``video`` is a URL such as ``"https://..."`` and no file of this name."""
    return isinstance(video, str) and bool(_URL.match(video)) and not os.path.exists(video)


def member_of(url: str) -> tuple[str, str] | None:
    """Return the name in the archive and the archive of ``"tar://NAME::ARCHIVE"``, or ``None``.

    This is fsspec's notation for a member of an archive.
    """
    name, separator, archive = url[len(_TAR) :].partition("::")
    return (name, archive) if url.lower().startswith(_TAR) and separator else None


def is_file_object(video: object) -> bool:
    """Return whether ``video`` has a method ``read``."""
    return callable(getattr(video, "read", None))


@contextmanager
def opened_input(video: Any, name: str) -> Iterator[EncodedVideo]:
    """Context manager that prepares a path, bytes, a file object or a URL for FFmpeg.

    Args:
        video: the path, bytes, file object or URL. A file object is read from its beginning, and
            its position is restored afterwards. A file object that can't seek is read to its end.
        name: name of the video for error texts.

    Raises:
        VideoNotFoundError: the file does not exist.
        VideoError: the video is empty, or can't be opened.
        MissingDependencyError: fsspec, or what fsspec needs for this URL, is not installed.
        UsageError: the file object is open in text mode, or its ``read`` is asynchronous.
    """
    if is_url(video) and video.lower().startswith("file:"):
        full = check_path(url2pathname(urlsplit(video).path))
        yield EncodedVideo(full, full)
    elif is_url(video):
        with ExitStack() as stack:
            file = _open_url(video, stack)
            with _opened_file(file, name) as encoded:
                yield encoded
    elif is_file_object(video):
        with _opened_file(video, name) as encoded:
            yield encoded
    elif isinstance(video, (bytes, bytearray, memoryview)):
        yield _of_bytes(video, name)
    else:
        full = check_path(video)
        yield EncodedVideo(full, full)


def _of_bytes(data: bytes | bytearray | memoryview, name: str) -> EncodedVideo:
    if len(data) == 0:
        raise VideoError(f"{name}: is empty (0 bytes). {_COPY}")
    return EncodedVideo(name, data if isinstance(data, bytes) else bytes(data))


@contextmanager
def _opened_file(file: Any, name: str) -> Iterator[EncodedVideo]:
    _require_bytes(file, name)
    position = position_of(file)
    if position is None:
        with _as_video_error(name):
            data = file.read()
        yield _of_bytes(data, name)
        return
    shared = SharedFile(file)
    try:
        with _as_video_error(name):
            size = shared.size()
        if size == 0:
            raise VideoError(f"{name}: the file is empty (0 bytes). {_COPY}")
        yield EncodedVideo(name, shared)
    finally:
        with suppress(Exception):
            file.seek(position)


def position_of(file: Any) -> int | None:
    """Return the position of a file object, or ``None`` if it can't seek."""
    try:
        position = int(file.tell())
        # Some file objects say that they can seek, and can't, such as the answer of a web server
        # that sends whole files only.
        file.seek(0, os.SEEK_END)
        file.seek(position)
    except (OSError, ValueError, AttributeError, NotImplementedError):
        return None
    return position


def _require_bytes(file: Any, name: str) -> None:
    if isinstance(file, io.TextIOBase):
        raise UsageError(f'{name}: is open in text mode; expected bytes: open(path, "rb").')
    if inspect.iscoroutinefunction(file.read):
        raise UsageError(
            f"{name}: read() is asynchronous; expected a file object. Pass the bytes: await read()."
        )


@contextmanager
def _as_video_error(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the errors of a file system have any class
        raise VideoError(f"{name}: can't be read ({error}).") from error


def open_file(address: str, stack: ExitStack) -> Any:
    """Open the file of a path or a URL for reading; the stack closes it.

    Raises:
        VideoNotFoundError, VideoError, MissingDependencyError: see :func:`opened_input`.
    """
    if is_url(address) and not address.lower().startswith("file:"):
        return _open_url(address, stack)
    path = url2pathname(urlsplit(address).path) if is_url(address) else address
    return stack.enter_context(open(check_path(path), "rb"))


def _open_member(url: str, name: str, archive: str, stack: ExitStack) -> Any:
    """Open a member of a tar file.

    fsspec opens such a URL too, but two threads that read one archive there disturb each other.
    """
    file = open_file(archive, stack)
    try:
        members = tarfile.open(fileobj=file)  # noqa: SIM115  # the stack closes it
        stack.enter_context(members)
        return stack.enter_context(members.extractfile(name) or io.BytesIO())
    except KeyError as error:
        raise VideoNotFoundError(
            f"{url}: the archive holds no file {name!r}. Check the name with its folders."
        ) from error
    except Exception as error:  # the errors of a file system have any class
        raise VideoError(f"{url}: can't be read from the archive ({error}). {_COPY}") from error


def _limits(url: str) -> dict[str, Any]:
    """Return the options of fsspec with which a web server that does not answer is an error."""
    from fsspec.config import conf

    is_web = url.lower().startswith(("http://", "https://"))
    if not is_web or "client_kwargs" in {**conf.get("http", {}), **conf.get("https", {})}:
        return {}
    try:
        from fsspec.implementations.http import aiohttp
    except ImportError:  # fsspec says what is missing
        return {}
    limit = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
    return {"client_kwargs": {"timeout": limit}}


def _open_url(url: str, stack: ExitStack) -> Any:
    member = member_of(url)
    if member is not None:
        return _open_member(url, *member, stack)
    try:
        import fsspec
    except ImportError as error:
        raise MissingDependencyError(
            f"{url}: URLs are opened with fsspec, which is not installed: pip install fsspec. Or "
            "download the video first."
        ) from error
    try:
        return stack.enter_context(fsspec.open(url, "rb", **_limits(url)))
    except ImportError as error:
        raise MissingDependencyError(f"{url}: fsspec can't open it: {error}.") from error
    except FileNotFoundError as error:
        raise VideoNotFoundError(
            f"{url}: no such file, or no connection, or no answer for {_SILENCE:g} seconds. Check "
            "the URL and the connection."
        ) from error
    except Exception as error:  # the errors of a file system have any class
        reason = str(error) or type(error).__name__
        raise VideoError(
            f"{url}: fsspec can't open it ({reason}). Check the URL and the connection, or "
            "download the video first."
        ) from error


def check_path(path: str | os.PathLike[str]) -> str:
    """Return the absolute path of a readable, non-empty file.

    Raises:
        VideoNotFoundError: the file does not exist.
        VideoError: the path is no regular file, or the file is empty or cannot be opened.
    """
    name = os.fspath(path)
    # FFmpeg reads "a:" at the beginning of a relative path as a protocol. An absolute path avoids
    # this.
    full = os.path.abspath(name)
    if os.path.isdir(full):
        raise VideoError(f"{name}: is a directory; expected a video file.")
    try:
        size = os.stat(full).st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VideoNotFoundError(
            f"{name}: no such file. Check the path, and the folder to which it is relative."
        ) from error
    except (OSError, ValueError) as error:
        raise VideoError(f"{name}: cannot be opened ({error}).") from error
    if not os.path.isfile(full):
        raise VideoError(f"{name}: is not a regular file; expected a video file.")
    if size == 0:
        raise VideoError(f"{name}: the file is empty (0 bytes). {_COPY}")
    try:
        with open(full, "rb"):
            return full
    except PermissionError as error:
        raise VideoError(
            f"{name}: no permission to read it; change the file's mode or owner."
        ) from error
    except OSError as error:
        raise VideoError(f"{name}: cannot be opened ({error}).") from error
