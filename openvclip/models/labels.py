"""Read files with one text on each line: labels, class names or templates."""

from __future__ import annotations

import os
from pathlib import Path

from openvclip.errors import ClassNamesError


def read_labels(path: str | os.PathLike[str]) -> list[str]:
    """Return the lines of a UTF-8 text file, without leading and trailing white space.

    Blank lines at the end of the file are ignored. The class index of a label is its line number
    minus 1, so a blank line between labels and a repeated label are errors.

    Args:
        path: the file.

    Raises:
        ClassNamesError: the file does not exist, is not UTF-8 or is empty, or a line is blank or
            repeated. The error names the file and the line.
    """
    file = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ClassNamesError(
            f"{file}: can't be read ({error}); expected a UTF-8 file with one name on each line."
        ) from error
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if lines == [""]:
        raise ClassNamesError(f"{file}: holds no names; expected one name on each line.")
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            raise ClassNamesError(
                f"{file}, line {number}: is blank; remove the line, or write a class name there."
            )
        if first_line.setdefault(line, number) != number:
            raise ClassNamesError(
                f"{file}, line {number}: {line!r} is on line {first_line[line]} already; every "
                "class needs a different name."
            )
    return lines
