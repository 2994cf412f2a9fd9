"""Labels: reading files with one text on each line, and labels that can't be told apart."""

from __future__ import annotations

import csv
import itertools
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from openvclip.errors import ClassNamesError, LabelWarning
from openvclip.video.lists import Line, read_lines

_TOLERANCE = 1e-6  # in a text feature of unit length; logits differ by a hundred times as much
_MOST_NAMES = 10

# Titles of the column with the labels, best first, and titles of a column with class indices.
_TITLES = ("label", "class_name", "classname", "label_name", "name", "class", "labels", "classes")
_NUMBERS = ("id", "index", "class_id", "label_id", "class_index", "number", "")


def read_labels(path: str | os.PathLike[str]) -> list[str]:
    """Return the names in a UTF-8 text file with one name on each line.

    White space at the ends of lines, blank lines at the end of the file and lines that begin with
    ``# `` are left out. The class index of a label is its place in the file, so a blank line
    between labels and a repeated label are errors.

    A first line ``label``, ``class`` or ``name`` is a header. In a file whose columns are separated
    by tabs, or in a ``.csv`` file, the header names the column of the labels. Without a header, a
    column with the numbers of the lines, from 0 or from 1, is left out.

    Args:
        path: the file.

    Raises:
        ClassNamesError: the file does not exist, is not UTF-8 or is empty, a line is blank or
            repeated, or the columns are not clear. The error names the file and the line.
    """
    file = os.fspath(path)
    lines = read_lines(file, "one name on each line", ClassNamesError)
    while lines and not lines[-1].text:
        lines.pop()
    if lines:
        lines = _without_numbers(file, _names_of_columns(file, lines))
    if not lines:
        raise ClassNamesError(f"{file}: holds no names; expected one name on each line.")
    first_line: dict[str, int] = {}
    for number, line in lines:
        if not line:
            raise ClassNamesError(
                f"{file}, line {number}: is blank; remove the line, or write a class name there."
            )
        if first_line.setdefault(line, number) != number:
            raise ClassNamesError(
                f"{file}, line {number}: {line!r} is on line {first_line[line]} already; every "
                "class needs a different name."
            )
    return [line.text for line in lines]


def _names_of_columns(file: str, lines: list[Line]) -> list[Line]:
    """Return the column of the names, without a header."""
    is_table = Path(file).suffix.lower() in (".csv", ".tsv")
    first = lines[0].text
    has_tabs = any("\t" in line.text for line in lines)
    separator = "\t" if has_tabs else ";" if ";" in first and "," not in first else ","
    if separator != "\t" and not is_table and not all(_is_quoted(line.text) for line in lines):
        return lines[1:] if lines[0].text.lower() in _TITLES else lines
    read = csv.reader([line.text or '""' for line in lines], delimiter=separator)
    rows = [[field.strip() for field in row] for row in read]
    titles = [re.sub(r"[\s-]+", "_", title.casefold()) for title in rows[0]]
    columns = [titles.index(title) for title in _TITLES if title in titles]
    if columns:
        lines, rows = lines[1:], rows[1:]
        numbers = [titles.index(title) for title in _NUMBERS if title in titles]
        _require_order(file, lines, rows, numbers)
        return [
            Line(line.number, row[columns[0]] if len(row) > columns[0] else "")
            for line, row in zip(lines, rows, strict=True)
        ]
    width = max(map(len, rows))
    if width == 1:
        return [Line(line.number, "".join(row)) for line, row in zip(lines, rows, strict=True)]
    for numbered, named in ((0, 1), (1, 0)):
        if width == 2 and _counts([row[numbered] if len(row) == 2 else "" for row in rows]):
            return [Line(line.number, row[named]) for line, row in zip(lines, rows, strict=True)]
    if separator == "\t":
        raise ClassNamesError(
            f"{file}: has several columns; expected one name on each line. Remove the other "
            "columns, or name the column of the names 'label' in the first line."
        )
    return lines  # names with commas that are not in quotes


def _require_order(file: str, lines: list[Line], rows: list[list[str]], columns: list[int]) -> None:
    """Check that a column of class indices counts the lines.

    Raises:
        ClassNamesError: the indices are in another order.
    """
    if columns and not _counts([row[columns[0]] if len(row) > columns[0] else "" for row in rows]):
        raise ClassNamesError(
            f"{file}, line {lines[0].number if lines else 1}: the column of class indices does not "
            "count the lines from 0 or from 1. Sort the lines by this column."
        )


def _without_numbers(file: str, lines: list[Line]) -> list[Line]:
    """Remove the numbers of the lines if a comma stands after them.

    Raises:
        ClassNamesError: a space stands after the numbers, which can be parts of the names.
    """
    texts = [line.text for line in lines if line.text]
    numbered = [re.match(r"(\d+)(\s*,\s*|[.:)]?\s+)(?=\S)", text) for text in texts]
    if len(texts) < 2 or not _counts([match[1] if match else "" for match in numbered]):
        return lines
    if all(match and "," in match[2] for match in numbered):
        return [Line(line.number, line.text.partition(",")[2].strip()) for line in lines]
    raise ClassNamesError(
        f"{file}: each line begins with its number ({texts[0]!r}), which would be a part of the "
        "name. Remove the numbers, or write a comma after them."
    )


def _counts(numbers: list[str]) -> bool:
    """Return whether texts are 0, 1, 2, ... or 1, 2, 3, ..."""
    n = len(numbers)
    return n > 0 and numbers in ([str(i) for i in range(n)], [str(i + 1) for i in range(n)])


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] == '"'


def warn_of_equal_labels(labels: Sequence[str], rows: Tensor) -> bool:
    """Warn if the text tower can't tell some labels apart, and return whether it warned.

    This happens if labels differ only beyond the length of a text, or only in case or white space
    that the tokenizer ignores.

    Args:
        labels: K labels.
        rows: what the text tower computes or reads for each label: features of unit length
            ``[K, D]``, or token ids ``[K, L]``.

    Warns:
        LabelWarning: rows of some labels are equal. The warning names at most ten labels.
    """
    groups = _equal_rows(rows.detach().cpu().double())
    if groups:
        names = [index for group in groups for index in group]
        shown, text = 0, []
        for group in groups:
            chosen = group[: _MOST_NAMES - shown]
            if len(chosen) > 1:
                text.append(" = ".join(_short(labels[index]) for index in chosen))
                shown += len(chosen)
        more = f", and {len(names) - shown} more" if len(names) > shown else ""
        warnings.warn(
            f"{len(names)} labels get the same probabilities as another label, because the text "
            f"tower can't tell them apart: {'; '.join(text)}{more}. Texts may be cut off at the "
            "end, and case and white space may be ignored. Make these labels shorter, or write "
            "what differs first.",
            LabelWarning,
            stacklevel=3,
        )
    return bool(groups)


def warn_of_single_label(labels: Sequence[str]) -> None:
    """Warn if there is only one label to choose from.

    Warns:
        LabelWarning: there is one label.
    """
    if len(labels) == 1:
        warnings.warn(
            f"{_short(labels[0])} is the only label, so its probability is 100 % for every video. "
            "Give the other labels that are possible, such as 'something else'.",
            LabelWarning,
            stacklevel=3,
        )


def _equal_rows(rows: Tensor) -> list[list[int]]:
    """Return the groups of rows ``[K, D]`` that are equal up to rounding, as sorted indices.

    Equal rows have equal projections on a line. So only neighbours along the line are compared.
    """
    line = torch.linspace(1, 50, rows.shape[1], dtype=rows.dtype).sin()
    order = (rows @ line).argsort().tolist()
    groups = [order[:1]]
    for before, index in itertools.pairwise(order):
        if (rows[index] - rows[before]).abs().max() > _TOLERANCE:
            groups.append([])
        groups[-1].append(index)
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _short(label: str) -> str:
    return repr(label if len(label) <= 60 else f"{label[:25]} ... {label[-25:]}")
