"""The standard streams of a command: any encoding, closed pipes, and no streams at all."""

from __future__ import annotations

import codecs
import errno
import functools
import inspect
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NoReturn, ParamSpec, TextIO, TypeVar

from openvclip.commands.progress import progress_lines
from openvclip.errors import OpenVCLIPError

__all__ = ["CLOSED_PIPE", "command", "standard_streams"]

CLOSED_PIPE = 141
"""The exit status that shells report for a process that a closed pipe ended."""

_UNWRITABLE = 2  # the exit status after an error
_HANDLER = "openvclip.readable"
# Symbols of the commands' own texts, in letters that every encoding has.
_LETTERS = {"λ": "lambda", "±": "+-", "×": "x", "→": "->", "…": "...", "–": "-", "—": "-"}

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


@contextmanager
def standard_streams() -> Iterator[None]:
    """Context manager for the body of a command, which prints to the standard streams.

    * A character that the encoding of a stream lacks is replaced: λ by ``lambda``, ± by ``+-``,
      other characters by their number, such as ``\\\\u6253``. Without this, Python raises
      ``UnicodeEncodeError``.
    * If the reader of standard output or standard error is gone (``| head -1``), the command ends
      without a text, with the status 141.
    * If standard output can't be written, for example because the disk is full, the command ends
      with an error and the status 2.
    * A stream that the process lacks (``>&-``, ``pythonw``) is replaced by an empty one.
    * In place of a progress bar, lines are written to standard error if it is not a terminal.

    On exit, the streams have their former error handlers.

    Raises:
        SystemExit: standard output can't be written.
    """
    with _replaced_if_absent(), _readable(sys.stdout), _readable(sys.stderr), progress_lines():
        try:
            yield
            _flush()
        except SystemExit:
            _flush()
            raise
        except OSError as error:
            broken = [stream for stream in (sys.stdout, sys.stderr) if _is_broken(stream)]
            if (not broken and error.errno != errno.ENOSPC) or error.filename is not None:
                raise
            _end(error)


def command(main: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorator for the function ``main`` of a script: see :func:`standard_streams`.

    An error of openvclip or of a file ends the script with one text, ``script.py: error: ...``.
    """

    @functools.wraps(main)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with standard_streams():
            try:
                return main(*args, **kwargs)
            except (OpenVCLIPError, OSError) as error:
                if isinstance(error, OSError) and error.errno and error.filename is None:
                    raise  # not about a file
                script = os.path.basename(inspect.getfile(main))
                raise SystemExit(f"{script}: error: {error}") from error

    return wrapped


def _flush() -> None:
    """Write the buffered output now. At the exit of the interpreter an error gives a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except OSError as error:
            _end(error)


def _end(error: OSError) -> NoReturn:
    """End the command, because a standard stream can't be written."""
    _silence()
    # Windows reports a closed pipe as an invalid argument.
    closed_on_windows = sys.platform == "win32" and error.errno == errno.EINVAL
    if isinstance(error, BrokenPipeError) or closed_on_windows:
        raise SystemExit(CLOSED_PIPE) from None
    print(f"error: the output can't be written ({error.strerror}).", file=sys.stderr)
    raise SystemExit(_UNWRITABLE) from error


def _is_broken(stream: TextIO) -> bool:
    """Return whether the buffered output of a stream can't be written, or its reader is gone."""
    try:
        stream.flush()
        number = stream.fileno()
    except (OSError, ValueError) as error:
        return isinstance(error, OSError) and error.errno is not None
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(number, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _silence() -> None:
    """Send what is left in the buffers to the null device."""
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed and _is_broken(stream):
            null = os.open(os.devnull, os.O_WRONLY)
            with suppress(OSError, ValueError):  # the stream has no file
                os.dup2(null, stream.fileno())
            os.close(null)


@contextmanager
def _readable(stream: object) -> Iterator[None]:
    """Replace the characters that the encoding of a stream lacks."""
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    before = stream.errors
    stream.reconfigure(errors=_HANDLER)
    try:
        yield
    finally:
        if not stream.closed:
            stream.reconfigure(errors=before)


@contextmanager
def _replaced_if_absent() -> Iterator[None]:
    """Replace the standard streams that are ``None``."""
    absent = [name for name in ("stdin", "stdout", "stderr") if getattr(sys, name) is None]
    with ExitStack() as stack:
        for name in absent:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, stack.enter_context(open(os.devnull, mode, encoding="utf-8")))
            stack.callback(setattr, sys, name, None)
        yield


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unknown = error.object[error.start : error.end]
    parts = (_LETTERS.get(letter) or _escaped(letter) for letter in unknown)
    return "".join(parts), error.end


def _escaped(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(_HANDLER, _replace)
