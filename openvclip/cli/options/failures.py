"""The list of the videos that a command could not read."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def report_failures(reasons: Sequence[str], treatment: str, more: str = "") -> None:
    """Print which videos can't be read, at most five of them, on the error stream.

    Args:
        reasons: the error of each video.
        treatment: what the command does with these videos.
        more: where all errors are listed.
    """
    if not reasons:
        return
    n = len(reasons)
    print(f"{plural(n, 'video')} that can't be read, {treatment}:", file=sys.stderr)
    for reason in reasons[:5]:
        print(f"  {reason}", file=sys.stderr)
    if n > 5:
        print(f"  and {n - 5} more{more}", file=sys.stderr)


def plural(n: int, noun: str) -> str:
    """Return a number with a noun."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
