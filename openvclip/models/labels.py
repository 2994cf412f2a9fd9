"""Labels: reading files with one text on each line, and labels that can't be told apart."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from openvclip.errors import ClassNamesError, LabelWarning

_TOLERANCE = 1e-6  # in a text feature of unit length; logits differ by a hundred times as much
_MOST_NAMES = 10


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
