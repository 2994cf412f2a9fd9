"""Progress bars in a terminal, and lines of progress where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["INTERVAL", "progress_bar", "progress_lines"]

INTERVAL = 30.0
"""Seconds between two lines of progress. The first line comes after this time too."""

_lines: ContextVar[bool] = ContextVar("lines", default=False)


@contextmanager
def progress_lines() -> Iterator[None]:
    """Context manager in which :func:`progress_bar` writes lines if there is no terminal.

    The commands use it. A function that another program calls writes nothing there.
    """
    token = _lines.set(True)
    try:
        yield
    finally:
        _lines.reset(token)


def progress_bar(
    iterable: Iterable[Any] | None = None, *, disable: bool | None = None, **options: Any
) -> Any:
    """Return a ``tqdm`` bar.

    In a terminal the bar is a bar. Elsewhere it is silent, or it writes a line to standard error
    every :data:`INTERVAL` seconds within :func:`progress_lines`.

    Args:
        iterable: see ``tqdm``.
        disable: ``True`` shows nothing, ``False`` shows a bar also where there is no terminal.
            Default: as above.
        **options: see ``tqdm``.
    """
    from tqdm import tqdm

    if disable is not None or not _lines.get() or _is_terminal(sys.stderr):
        return tqdm(iterable, disable=disable, **options)

    class Lines(tqdm):  # type: ignore[misc]
        """A bar whose states are lines of their own."""

        def refresh(self, nolock: bool = False, lock_args: object = None) -> None:
            if not nolock:  # tqdm.write asks with nolock to draw the bar again
                self.display()

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            state = self.format_dict
            if not self.total or self.n < self.total:
                self.fp.write(_line(self.desc, self.n, self.total, self.initial, state["elapsed"]))
                self.fp.flush()

        def clear(self, nolock: bool = False) -> None:
            """Do nothing: a line stays."""

        def close(self) -> None:
            self.leave = False
            self.delay = float("inf")  # the base class erases nothing and writes no last line
            super().close()

    pace = {"mininterval": INTERVAL, "delay": INTERVAL, "miniters": 1}
    return Lines(iterable, disable=False, **pace, **options)


def _line(title: str, n: int, total: int | None, initial: int, seconds: float) -> str:
    """Return a line such as ``"evaluate: 120 of 3783, 2:10 passed, about 1:06:10 left"``."""
    title = title.removesuffix(": ") or "done"
    if not total:
        return f"{title}: {n}, {_clock(seconds)} passed\n"
    done = n - initial
    left = f", about {_clock(seconds / done * (total - n))} left" if done > 0 else ""
    return f"{title}: {n} of {total}, {_clock(seconds)} passed{left}\n"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False
