"""The code of a reader's own functions, so that results of two versions don't get mixed.

The results of a method are known by names and settings. If the function changes, its old results
are those of another method. A digest of the function's code is kept beside the results. The digest
of a method also has the names of its trainings, of their end and of its form.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

from examples.shapes.results import Results
from examples.shapes.trials.registry import METHODS, TRAININGS
from examples.shapes.trials.rows import PUBLISHED
from examples.shapes.trials.store import is_key_of

__all__ = ["digest", "require_same_code"]

_OWN = "examples.shapes.trials."
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def require_same_code(results: Results, methods: Iterable[str], path: Path) -> None:
    """Record the code of the reader's own functions; refuse functions that changed.

    The methods and trainings of this package are left out: the results hold the versions of the
    packages. Comments and line breaks of a function can change, and so can the functions that it
    calls and the constants of its module. A function without results can change, too.

    Args:
        results: the results, whose ``"code"`` gets the digests.
        methods: names of the methods that will run.
        path: the file of the results, for the error text.

    Raises:
        FileExistsError: a function is another than that of the results.
    """
    known: dict[str, str] = results.setdefault("code", {})
    for what, code, has_results in _own(results, methods):
        if known.get(what, code) != code and has_results:
            raise FileExistsError(
                f"{path} holds results of {what} with other code. Give the changed function "
                f"another name in register(), give another --out, or remove the folder "
                f"{path.parent}."
            )
        known[what] = code


def _own(results: Results, methods: Iterable[str]) -> Iterable[tuple[str, str, bool]]:
    """Yield what is the reader's own: its name, its digest, and whether it has results."""
    places = [results["tuning"], *results["cells"].values()]
    rows = {name for place in places for name in place.get("methods", {})}
    keys = {key for place in places for key in place.get("trainings", {})}
    for name in methods:
        method = METHODS[name]
        if name not in PUBLISHED:
            # A function of this package, such as first_end("swa"), can be part of an own method.
            code = digest(method.weights, *method.needs, method.form.name)
            yield f"the method {name!r}", code, name in rows
        for need in method.needs:
            run = TRAININGS[need].run
            if not getattr(_plain(run), "__module__", "").startswith(_OWN):
                has_results = any(is_key_of(key, need) for key in keys)
                yield f"the training {need!r}", digest(run), has_results


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return _plain(function.func) if isinstance(function, partial) else function


def digest(function: Callable[..., Any], *more: str) -> str:
    """Return a short text that differs for functions of different code, or an empty text.

    It is empty if Python does not find the code, for example of a function that was typed in.

    Args:
        function: the function. Values that are bound to it belong to its code.
        more: further texts that belong to the code.
    """
    plain = _plain(function)
    try:
        source = inspect.getsource(plain)
    except (OSError, TypeError):
        return ""
    with suppress(SyntaxError):  # of a lambda in the middle of a call
        source = ast.unparse(ast.parse(dedent(source)))  # ast.dump differs between Pythons
    given = (function.args, function.keywords) if isinstance(function, partial) else ()
    closed = [cell.cell_contents for cell in getattr(plain, "__closure__", None) or ()]
    # The address of an object is another one in each process.
    text = _ADDRESS.sub("", repr((source, given, closed, more)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
