"""Check the paths that a caller gives, before any work is done."""

from __future__ import annotations

import os

from openvclip.errors import UsageError


def require_path(path: object, name: str, expected: str) -> str:
    """Return a path as a text.

    Args:
        path: the path that a caller gave.
        name: the name of the argument, for the error.
        expected: the paths that are expected, in words.

    Raises:
        UsageError: ``path`` is neither a text nor an ``os.PathLike``, or is empty.
    """
    if isinstance(path, (str, os.PathLike)):
        text = os.fspath(path)
        if isinstance(text, str) and text and "\0" not in text:
            return text
    raise UsageError(f"{name}={path!r}: expected {expected}.")
