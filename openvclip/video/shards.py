"""The videos in tar shards, on a disk or in object storage, without unpacking them."""

from __future__ import annotations

import glob
import itertools
import os
import re
import shutil
import string
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from openvclip.errors import MissingDependencyError, UsageError, VideoError, listed
from openvclip.video._inputs import is_url, open_file
from openvclip.video.files import VIDEO_SUFFIXES

__all__ = ["TarVideo", "expand_braces", "shard_size", "shard_videos", "shards_of"]

_IN_MEMORY = 64 * 2**20  # bytes; a larger video is copied to a temporary file
_NUMBERS = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")
_ALPHABET = string.ascii_uppercase + string.ascii_lowercase


@dataclass(frozen=True, eq=False)
class TarVideo:
    """A video of a shard.

    Attributes:
        path: the address of the video, such as ``"tar://a.mp4::s3://bucket/0001.tar"``. All
            functions that read a video open it.
        file: the video itself: a binary file object that can seek.
        size: number of bytes.
        mtime: time of the last change in the archive, in seconds since 1970.
    """

    path: str
    file: Any
    size: int
    mtime: float


class _Copy(tempfile.SpooledTemporaryFile):  # type: ignore[type-arg]
    """A copy of a member, which error texts call by its address."""

    def __init__(self, address: str) -> None:
        super().__init__(max_size=_IN_MEMORY)
        self._address = address

    @property
    def name(self) -> str:
        """The address of the member."""
        return self._address


def shards_of(patterns: str | Sequence[str]) -> list[str]:
    """Return the addresses of shards, in the order of the patterns.

    Args:
        patterns: a path or a URL that fsspec opens, or several of them. ``{0000..0999}`` and
            ``{a,b}`` are expanded as by bash, ``*``, ``?`` and ``[...]`` as by a shell. Paths
            become absolute.

    Raises:
        UsageError: there is no pattern, no shard fits a pattern, a shard is named twice, or the
            braces of a pattern are not closed.
        MissingDependencyError: fsspec, or what fsspec needs for the URL, is not installed.
    """
    several = [patterns] if isinstance(patterns, str) else list(patterns)
    names = [name for pattern in several for name in expand_braces(pattern)]
    shards = [shard for name in names for shard in _matches(name)]
    if not shards:
        raise UsageError("No shards are given; expected a pattern such as 's3://b/{000..999}.tar'.")
    missing = [shard for shard in shards if not is_url(shard) and not os.path.exists(shard)]
    if len(missing) == len(shards):
        raise UsageError(
            f"{listed(several)}: none of the {len(shards)} shards exists ({listed(missing)}). "
            "Check the folder, and the numbers with their leading zeros; quote the pattern."
        )
    twice = sorted(shard for shard, count in Counter(shards).items() if count > 1)
    if twice:
        raise UsageError(f"{listed(twice)}: given more than once; expected each shard once.")
    return shards


def _matches(name: str) -> list[str]:
    """Return the shards that a path or a URL with wildcards names."""
    if not is_url(name):
        full = os.path.abspath(name)
        if not glob.has_magic(full) or os.path.exists(full):
            return [full]
        found = sorted(glob.glob(full, recursive=True))
    elif glob.has_magic(name.partition("://")[2]) and not name.lower().startswith("http"):
        found = _remote_matches(name)
    else:
        return [name]  # in a web address, "?" begins the parameters
    if not found:
        raise UsageError(f"{name}: no shard fits this pattern.")
    return found


def _remote_matches(pattern: str) -> list[str]:
    try:
        from fsspec.core import url_to_fs

        files, path = url_to_fs(pattern)
        return [files.unstrip_protocol(match) for match in sorted(files.glob(path))]
    except ImportError as error:
        raise MissingDependencyError(
            f"{pattern}: can't be opened with fsspec ({error})."
        ) from error
    except Exception as error:  # the errors of a file system have any class
        raise UsageError(
            f"{pattern}: the shards can't be listed ({error}). Check the URL and the connection."
        ) from error


def expand_braces(pattern: str) -> list[str]:
    r"""Expand braces as bash does.

    Args:
        pattern: text with ranges ``{000..999}``, ``{a..f}`` and ``{0..8..2}``, and choices
            ``{a,b}``, also nested. A backslash takes the meaning from the next character.

    Example:
        >>> expand_braces("{a,b}-{08..10}.tar")[:4]
        ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar']

    Raises:
        UsageError: a brace is not closed, or not opened.
    """
    parts = _parts(pattern, pattern)
    return [re.sub(r"\\(.)", r"\1", "".join(words)) for words in itertools.product(*parts)]


def _parts(text: str, pattern: str) -> list[list[str]]:
    """Return the choices for each part of a text, with their backslashes."""
    parts: list[list[str]] = []
    for depth_of_part, part in _split(text, "", pattern):
        if not depth_of_part:
            parts.append([part])
            continue
        choices = _choices(part, pattern)
        parts += [["{"], *_parts(part, pattern), ["}"]] if choices is None else [choices]
    return parts


def _choices(inner: str, pattern: str) -> list[str] | None:
    """Return what the text between two braces stands for; ``None`` if it stands for itself."""
    numbers, letters = _NUMBERS.fullmatch(inner), _LETTERS.fullmatch(inner)
    if numbers:
        first, last, step = numbers.groups()
        padded = any(re.match("-?0.", number) for number in (first, last))
        width = max(len(first), len(last)) if padded else 0
        return [f"{n:0{width}d}" for n in _range(int(first), int(last), step)]
    if letters:
        first, last, step = letters.groups()
        return [_ALPHABET[n] for n in _range(_ALPHABET.index(first), _ALPHABET.index(last), step)]
    choices = [part for _, part in _split(inner, ",", pattern)]
    if len(choices) < 2:
        return None
    return [
        "".join(words)
        for choice in choices
        for words in itertools.product(*_parts(choice, pattern))
    ]


def _range(first: int, last: int, step: str | None) -> Iterable[int]:
    size = int(step or 1) or 1
    return range(first, last + 1, size) if first <= last else range(first, last - 1, -size)


def _split(text: str, separator: str, pattern: str) -> Iterator[tuple[int, str]]:
    """Split a text at its outer separators, or at its outer braces.

    Yields:
        Whether the part lies between braces (only without a separator), and the part.
    """
    depth = start = at = 0
    while at < len(text):
        letter = text[at]
        if letter == "\\":
            at += 1
        elif letter == "{":
            if depth == 0 and not separator:
                yield 0, text[start:at]
                start = at + 1
            depth += 1
        elif letter == "}":
            depth -= 1
            if depth == 0 and not separator:
                yield 1, text[start:at]
                start = at + 1
        elif letter == separator and depth == 0:
            yield 0, text[start:at]
            start = at + 1
        if depth < 0:
            break
        at += 1
    if depth != 0:
        raise UsageError(
            f"{pattern!r}: its braces are not paired. Write a brace that is part of a name as \\{{."
        )
    yield 0, text[start:]


def shard_videos(shard: str) -> Iterator[TarVideo]:
    """Iterate over the videos in a shard, in one pass from its beginning to its end.

    Videos are recognised by the extension of their names. Labels, texts, folders, links and hidden
    files are left out. At most one video is read ahead of its use. Close ``file`` after the use.

    Args:
        shard: the path or the URL of a tar file, which may be compressed.

    Yields:
        A :class:`TarVideo` for each video.

    Raises:
        VideoNotFoundError: the shard does not exist.
        VideoError: the shard can't be opened, is no tar file, or breaks off. The videos before the
            break were yielded.
        MissingDependencyError: fsspec, or what fsspec needs for the URL, is not installed.
    """
    with ExitStack() as stack:
        file = open_file(shard, stack)
        try:
            yield from _videos(shard, file)
        except VideoError:
            raise
        except Exception as error:  # the errors of a file system have any class
            raise VideoError(
                f"{shard}: can't be read to its end ({error or type(error).__name__}). Copy it "
                "again, or check the connection."
            ) from error


def shard_size(shard: str) -> int | None:
    """Return the number of bytes of a shard; ``None`` if that is not known.

    Args:
        shard: the path or the URL of a tar file.
    """
    try:
        if not is_url(shard):
            return os.stat(shard).st_size
        from fsspec.core import url_to_fs

        files, path = url_to_fs(shard)
        size = files.info(path).get("size")
    except Exception:  # the errors of a file system have any class; reading the shard reports them
        return None
    return None if size is None else int(size)


# Between the members of an archive, tarfile takes such a header for the end of the archive.
_DAMAGED: Any = (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]


class _Member(tarfile.TarInfo):
    """A member of an archive. A damaged header is an error."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> _Member:
        """Read the next header.

        Args:
            tarfile: the archive.
        """
        try:
            return super().fromtarfile(tarfile)
        except _DAMAGED as error:
            raise OSError(f"{error} at byte {tarfile.offset}") from error


def _videos(shard: str, file: Any) -> Iterator[TarVideo]:
    # The mode reads from the beginning to the end, as object storage likes it.
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as archive:
        headers: Any = archive
        for member in archive:
            headers.members.clear()  # tarfile keeps all headers, and needs none of them
            if not member.isfile() or not _is_video(member.name):
                continue
            path = f"tar://{member.name}::{shard}"
            content = archive.extractfile(member)
            assert content is not None  # of a regular file
            copy = _Copy(path)
            try:
                shutil.copyfileobj(content, copy)
            except BaseException:
                copy.close()
                raise
            yield TarVideo(path, copy, member.size, float(member.mtime))


def _is_video(member: str) -> bool:
    name = os.path.basename(member)
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES
