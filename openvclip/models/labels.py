"""Files with a text on each line: class names, templates."""

from __future__ import annotations

import os
from pathlib import Path

from openvclip.errors import ClassNamesError


def read_labels(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a UTF-8 file, without white space around them.

    Blank lines at the end do not count. One before that is an error, and so is a line that
    occurs twice: a class index counts the lines, so neither can be passed over.

    Raises:
        ClassNamesError: no such file, not UTF-8, nothing in it, a blank line or a duplicate; the
            text names the file and the lines.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ClassNamesError(
            f"{os.fspath(path)}: can't be read ({error}); expected a UTF-8 file with one name on "
            "each line."
        ) from error
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if lines == [""]:
        raise ClassNamesError(f"{os.fspath(path)}: holds no names; expected one on each line.")
    first: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            raise ClassNamesError(
                f"{os.fspath(path)}, line {number}: is blank; remove it, or give the class a name."
            )
        if first.setdefault(line, number) != number:
            raise ClassNamesError(
                f"{os.fspath(path)}, line {number}: {line!r} is on line {first[line]} already; "
                "every class needs its own name."
            )
    return lines
