"""The code of a reader's own functions, so that results of two versions don't get mixed.

The results of a method are known by names and settings. If the function changes, its old results
are those of another method. A digest of the function's code is kept beside the results.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

from examples.shapes.results import Results
from examples.shapes.trials.registry import METHODS, TRAININGS

__all__ = ["digest", "require_same_code"]

_OWN = "examples.shapes.trials."


def require_same_code(results: Results, methods: Iterable[str], path: Path) -> None:
    """Record the code of the reader's own functions; refuse functions that changed.

    The functions of this package are left out: the results hold the versions of the packages.
    Comments and line breaks of a function can change, and so can the functions that it calls.

    Args:
        results: the results, whose ``"code"`` gets the digests.
        methods: names of the methods that will run.
        path: the file of the results, for the error text.

    Raises:
        FileExistsError: a function is another than that of the results.
    """
    known: dict[str, str] = results.setdefault("code", {})
    for what, function in _functions(methods):
        if getattr(_plain(function), "__module__", "").startswith(_OWN):
            continue
        code = digest(function)
        if known.setdefault(what, code) != code:
            raise FileExistsError(
                f"{path} holds results of {what} with other code. Give the changed function "
                f"another name in register(), give another --out, or remove the folder "
                f"{path.parent}."
            )


def _functions(methods: Iterable[str]) -> Iterable[tuple[str, Callable[..., Any]]]:
    for name in methods:
        method = METHODS[name]
        yield f"the method {name!r}", method.weights
        for need in method.needs:
            yield f"the training {need!r}", TRAININGS[need].run


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return _plain(function.func) if isinstance(function, partial) else function


def digest(function: Callable[..., Any]) -> str:
    """Return a short text that differs for functions of different code, or an empty text.

    It is empty if Python does not find the code, for example of a function that was typed in.
    """
    try:
        source = inspect.getsource(_plain(function))
    except (OSError, TypeError):
        return ""
    with suppress(SyntaxError):  # of a lambda in the middle of a call
        source = ast.dump(ast.parse(dedent(source)))
    given = repr((function.args, function.keywords)) if isinstance(function, partial) else ""
    return hashlib.sha256((source + given).encode()).hexdigest()[:16]
