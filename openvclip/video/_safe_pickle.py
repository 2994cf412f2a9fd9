"""Read pickles of plain data. A pickle that could run code is refused before it is loaded."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterator
from typing import Any, NoReturn

from openvclip.errors import AnnotationError

__all__ = ["plain_data"]

# The instructions that make dicts, lists, tuples, texts, numbers and None, and those that order
# the stack. Every other instruction imports a name, calls a function, or asks the reader for an
# object.
_PLAIN = {
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP"),
    *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"),
    *("LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("EMPTY_LIST", "APPEND", "APPENDS", "LIST", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2"),
    *("TUPLE3", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
    *("GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
}
_KINDS = {kind.code: kind for kind in pickletools.opcodes}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}


class _NoNames(pickle.Unpickler):
    """An unpickler that knows no name, so that it can make nothing but plain data."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to an object that is not in the file")


def plain_data(content: bytes, path: str, expected: str) -> Any:
    """Return the dicts, lists, texts and numbers of a pickle.

    Args:
        content: the bytes of the file. Text of Python 2 is read as UTF-8.
        path: the file, for the error texts.
        expected: what the file should hold, for the error texts.

    Raises:
        AnnotationError: the pickle holds something else, or is damaged. Nothing was executed.
    """
    try:
        _require_plain(content, path)
        return _NoNames(io.BytesIO(content), encoding="utf-8", errors="replace").load()
    except AnnotationError:
        raise
    except Exception as error:  # a damaged pickle raises errors of every kind
        reason = str(error).strip().rstrip(".") or type(error).__name__
        raise AnnotationError(
            f"{path}: is not a pickle that can be read ({reason}). Copy or download it again; "
            f"expected {expected}."
        ) from error


def _instructions(content: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the name and the argument of each instruction, without executing any.

    ``pickletools.genops`` does the same, and refuses the accents that Python 2 wrote.
    """
    file = io.BytesIO(content)
    while code := file.read(1):
        kind = _KINDS.get(code.decode("latin-1"))
        if kind is None:
            raise ValueError(f"unknown instruction {code!r}")
        if kind.name == "STRING":
            yield kind.name, file.readline()
        else:
            yield kind.name, None if kind.arg is None else kind.arg.reader(file)
        if kind.name == "STOP":
            return


def _require_plain(content: bytes, path: str) -> None:
    names: list[str] = []
    for name, argument in _instructions(content):
        if name not in _PLAIN:
            what = str(argument).replace(" ", ".") if argument is not None else ""
            # STACK_GLOBAL takes the names from the stack: they are the last two texts.
            what = ".".join(names[-2:]) if name == "STACK_GLOBAL" else what
            raise AnnotationError(
                f"{path}: the pickle holds more than dicts, lists, texts and numbers "
                f"({name}{f' {what}' if what else ''}), so loading it could run code. "
                "Nothing was loaded. Get the file from its publisher again, or save the captions "
                "as JSON."
            )
        # The memo of the unpickler is an array: a large index would fill the memory.
        if name in _PUTS and int(argument or 0) > len(content):
            raise AnnotationError(f"{path}: the pickle is damaged (a memo index of {argument}).")
        if isinstance(argument, str):
            names = [*names[-1:], argument]
