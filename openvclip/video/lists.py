"""Read the lines of list files that people write by hand or export from other programs."""

from __future__ import annotations

import os
from typing import NamedTuple

from openvclip.errors import AnnotationError, OpenVCLIPError, near_path

__all__ = ["Line", "read_bytes", "read_lines", "read_text"]

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Line(NamedTuple):
    """A line of a list.

    Attributes:
        number: number of the line in the file, from 1.
        text: the line, without white space at its ends.
    """

    number: int
    text: str


def read_lines(
    path: str | os.PathLike[str],
    expected: str,
    error_class: type[OpenVCLIPError] = AnnotationError,
) -> list[Line]:
    """Return the lines of a UTF-8 text file, without comments.

    The line ends of Windows and of old Macs, a byte order mark and white space at the ends of lines
    are removed. A comment is a line that is ``#`` or begins with ``# ``. Blank lines are kept.

    Args:
        path: the file.
        expected: what the file should hold, for the error text.
        error_class: class of the error.

    Raises:
        OpenVCLIPError: see :func:`read_text`.
    """
    raw = read_text(path, expected, error_class).split("\n")
    lines = [Line(number, line.strip("\ufeff").strip()) for number, line in enumerate(raw, 1)]
    return [line for line in lines if line.text != "#" and not line.text.startswith(("# ", "#\t"))]


def read_text(
    path: str | os.PathLike[str],
    expected: str,
    error_class: type[OpenVCLIPError] = AnnotationError,
) -> str:
    """Return the content of a UTF-8 text file. Every line ends with a line feed alone.

    Args:
        path: the file.
        expected: what the file should hold, for the error text.
        error_class: class of the error.

    Raises:
        OpenVCLIPError: an error of ``error_class``. The file can't be read or is not UTF-8. The
            text names UTF-16 files, which spreadsheets write as "Unicode text".
    """
    file = os.fspath(path)
    content = read_bytes(file, expected, error_class)
    if content.startswith(_UTF16) or content[:400].count(b"\0") > len(content[:400]) // 4:
        raise error_class(f"{file}: is UTF-16 text. Save it as UTF-8; expected {expected}.")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise error_class(
            f"{file}, line {line}: is not UTF-8 text ({error.reason} {content[error.start]:#x}). "
            f"Save the file as UTF-8; expected {expected}."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_bytes(
    path: str | os.PathLike[str],
    expected: str,
    error_class: type[OpenVCLIPError] = AnnotationError,
) -> bytes:
    """Return the content of a file.

    Args:
        path: the file.
        expected: what the file should hold, for the error text.
        error_class: class of the error.

    Raises:
        OpenVCLIPError: an error of ``error_class``: the file can't be read.
    """
    file = os.fspath(path)
    try:
        with open(file, "rb") as opened:
            return opened.read()
    except FileNotFoundError as error:
        raise error_class(f"{file}: no such file{near_path(file)}; expected {expected}.") from error
    except OSError as error:
        raise error_class(f"{file}: can't be read ({error}); expected {expected}.") from error
