"""Lists of videos and their labels: ``path,label`` files."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from openvclip.errors import AnnotationError

__all__ = ["Annotations", "read_annotations"]


class Annotations(NamedTuple):
    """The videos of a data set and their labels.

    Attributes:
        samples: ``(path, class index)`` of each video, in the order of the file; paths as written
            there.
        class_names: the name of each class, or ``None`` when the file holds only indices.
    """

    samples: list[tuple[str, int]]
    class_names: list[str] | None


class _Row(NamedTuple):
    line: int
    path: str
    label: str


def read_annotations(
    path: str | os.PathLike[str], class_names: Sequence[str] | None = None
) -> Annotations:
    """Reads a list of videos.

    One video on a line, ``path,label`` or ``path label``: the first line that is not blank decides
    which, and a header ``path,label,...`` may name the columns (further columns are left alone).
    In comma-separated files a path or name with a comma stands in double quotes; in
    space-separated ones the label is the last word, or the longest class name that ends the line.
    A label is a class name or, if no class is called so, an index from 0.

    Args:
        path: a UTF-8 text file.
        class_names: the classes in the order of their indices. Without it, labels must be all
            indices, or all names, whose classes are then their sorted set.

    Returns:
        The samples, and the class names.

    Raises:
        AnnotationError: no such file, no videos in it, or a line with too few fields or an unknown
            class; the text names the file and the line.
    """
    names = None if class_names is None else _unique(class_names)
    rows = list(_rows(os.fspath(path), names))
    if not rows:
        raise AnnotationError(f"{path}: holds no videos; expected lines of the form path,label.")
    if names is None and not all(_is_index(row.label) for row in rows):
        names = sorted({row.label for row in rows})
    lookup = {name: index for index, name in enumerate(names or ())}
    samples = [(row.path, _label(row, lookup, os.fspath(path), names)) for row in rows]
    return Annotations(samples, names)


def _unique(class_names: Sequence[str]) -> list[str]:
    names = list(class_names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AnnotationError(
            f"class_names holds {twice} more than once; every class needs its own name."
        )
    return names


def _rows(path: str, names: Sequence[str] | None) -> Iterator[_Row]:
    lines = [(n, line) for n, line in enumerate(_read_lines(path), 1) if line.strip()]
    if not lines:
        return
    split = _split_commas if "," in lines[0][1] else _split_spaces
    columns = (0, 1)
    for position, (number, line) in enumerate(lines):
        try:
            fields = split(line, names)
        except csv.Error as error:
            raise AnnotationError(f"{path}, line {number}: {error} in {line!r}.") from error
        if position == 0 and {"path", "label"} <= set(fields):
            columns = (fields.index("path"), fields.index("label"))
            continue
        if len(fields) <= max(columns) or not all(fields[column] for column in columns):
            raise AnnotationError(
                f"{path}, line {number}: {line.strip()!r} has too few fields; expected a path and "
                "a label."
            )
        yield _Row(number, fields[columns[0]], fields[columns[1]])


def _read_lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8-sig", newline=None) as file:
            return file.read().split("\n")
    except FileNotFoundError as error:
        raise AnnotationError(f"{path}: no such file; expected a list of path,label.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise AnnotationError(f"{path}: cannot be read as UTF-8 text ({error}).") from error


def _split_commas(line: str, names: Sequence[str] | None) -> list[str]:
    return [field.strip() for field in next(csv.reader([line], skipinitialspace=True))]


def _split_spaces(line: str, names: Sequence[str] | None) -> list[str]:
    line = line.strip()
    if line.split() == ["path", "label"]:
        return ["path", "label"]
    endings = [name for name in names or () if line.endswith(" " + name)]
    if endings:
        label = max(endings, key=len)
        return [line[: -len(label)].strip(), label]
    return line.rsplit(maxsplit=1)


def _is_index(label: str) -> bool:
    return label.isascii() and label.isdigit()


def _label(row: _Row, lookup: dict[str, int], path: str, names: Sequence[str] | None) -> int:
    if row.label in lookup:
        return lookup[row.label]
    if not _is_index(row.label):
        raise AnnotationError(
            f"{path}, line {row.line}: unknown class {row.label!r}; it is none of the "
            f"{len(lookup)} class names, nor an index."
        )
    index = int(row.label)
    if names is not None and index >= len(names):
        raise AnnotationError(
            f"{path}, line {row.line}: class index {index} of {row.path!r}; there are {len(names)} "
            f"classes, so at most {len(names) - 1} is possible."
        )
    return index
