"""Parse annotation files of all known formats.

A format is recognised from the first line that is not blank. The lines of HMDB-51's files contain
no class, so this format is also recognised from the name of the file.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from openvclip.errors import AnnotationError, listed
from openvclip.video.files import VIDEO_SUFFIXES
from openvclip.video.lists import Line, read_lines
from openvclip.video.names import class_name, class_names

__all__ = ["Row", "Table", "read_table"]

_UCF = re.compile(r"(?P<path>(?P<folder>\w+)/v_\w+_g\d+_c\d+\.avi)(?:\s+(?P<index>\d+))?")
_HMDB = re.compile(r"(?P<name>\S.*\.avi)\s+(?P<flag>[012])")
_HMDB_FILE = re.compile(r"(?P<folder>.+)_test_split[123]\.txt")
_HMDB_FLAGS = {"0": "unused", "1": "train", "2": "test"}
_KINETICS = ("label", "youtube_id", "time_start", "time_end")
_KINETICS_SUBSETS = {"valid": "val", "validate": "val", "validation": "val"}


class Row(NamedTuple):
    """A row of an annotation file.

    Attributes:
        file: the annotation file.
        line: number of the line, from 1.
        path: path of the video.
        label: class name or class index, as text.
        subset: subset of an official list, or ``None``.
    """

    file: str
    line: int
    path: str
    label: str
    subset: str | None = None

    @property
    def location(self) -> str:
        """The file and the line number, for error texts."""
        return f"{self.file}, line {self.line}"


class Table(NamedTuple):
    """The rows of a file or folder.

    Attributes:
        rows: the rows.
        dataset: ``"ucf101"`` or ``"hmdb51"`` for official lists, ``None`` for other files. The
            official class names of this data set are the default of ``read_annotations``.
        guessed: true for lists of Kinetics, which contain no file names. The paths are then made
            from the identifiers and the times of the videos.
    """

    rows: list[Row]
    dataset: str | None = None
    guessed: bool = False


_Lines = list[Line]


def read_table(path: str, names: Sequence[str] | None, split: int) -> Table:
    """Read an annotation file or a folder of official lists."""
    if os.path.isdir(path):
        return _read_folder(path, names, split)
    lines = [line for line in read_lines(path, "a list of path,label") if line.text]
    if not lines:
        return Table([])
    first = lines[0].text
    if _is_ucf(first):
        return Table(list(_ucf_rows(path, lines, names)), "ucf101")
    if _HMDB_FILE.fullmatch(os.path.basename(path)) and _HMDB.fullmatch(first):
        return Table(list(_hmdb_rows(path, lines, names)), "hmdb51")
    if set(_KINETICS) <= set(_split_commas(first)):
        return Table(list(_kinetics_rows(path, lines)), guessed=True)
    return Table(list(_plain_rows(path, lines, names)))


def _read_folder(path: str, names: Sequence[str] | None, split: int) -> Table:
    """Read the official lists of one of the three splits."""
    ucf = [os.path.join(path, f"{kind}list{split:02d}.txt") for kind in ("test", "train")]
    hmdb = [
        os.path.join(path, f"{name.replace(' ', '_')}_test_split{split}.txt")
        for name in class_names("hmdb51")
    ]
    for dataset, files in (("ucf101", ucf), ("hmdb51", hmdb)):
        present = [file for file in files if os.path.isfile(file)]
        absent = [os.path.basename(file) for file in files if file not in present]
        if present and absent:
            raise AnnotationError(
                f"{path}: {len(absent)} of the {len(files)} files of split {split} are missing: "
                f"{listed(absent, 5)}. Unpack them again."
            )
        if present:
            return Table(
                [row for file in files for row in read_table(file, names, 1).rows], dataset
            )
    raise AnnotationError(
        f"{path}: is a folder without official lists of split {split}; expected "
        f"{os.path.basename(ucf[0])} and {os.path.basename(ucf[1])} (UCF-101), or "
        f"{os.path.basename(hmdb[0])} and the files of the other classes (HMDB-51)."
    )


def _too_few(path: str, number: int, line: str, expected: str) -> AnnotationError:
    return AnnotationError(
        f"{path}, line {number}: {line!r} has too few fields; expected {expected}."
    )


# --- UCF-101: "Class/v_Class_g08_c01.avi 1" in training lists, without "1" in test lists ----------


def _ucf_index(folder: str) -> int:
    """Return the official index of a class, from 1, or 0 if the class is unknown."""
    name, names = class_name("ucf101", folder), class_names("ucf101")
    return names.index(name) + 1 if name in names else 0


def _is_ucf(line: str) -> bool:
    # A list that is not official can have the same form, but class indices from 0.
    match = _UCF.fullmatch(line)
    if not match:
        return False
    official = _ucf_index(match["folder"])
    return official > 0 and match["index"] in (None, str(official))


def _ucf_rows(path: str, lines: _Lines, names: Sequence[str] | None) -> Iterator[Row]:
    for number, line in lines:
        match = _UCF.fullmatch(line)
        if not match:
            raise _too_few(path, number, line, "Class/v_Class_g01_c01.avi as in UCF-101's lists")
        official = _ucf_index(match["folder"])
        if match["index"] not in (None, str(official)) and official:
            raise AnnotationError(
                f"{path}, line {number}: class index {match['index']} of {match['path']!r}; "
                f"expected {official} as in UCF-101's official lists. Line {lines[0].number} "
                "has the format of these lists. Correct the index, or write lines of path,label."
            )
        subset = "train" if match["index"] else "test"
        label = _folder_label("ucf101", match["folder"], names)
        yield Row(path, number, match["path"], label, subset)


# --- HMDB-51: a file for each class, "name.avi 1" (0 unused, 1 train, 2 test) --------------------


def _hmdb_rows(path: str, lines: _Lines, names: Sequence[str] | None) -> Iterator[Row]:
    file = _HMDB_FILE.fullmatch(os.path.basename(path))
    assert file is not None
    folder = file["folder"]
    for number, line in lines:
        match = _HMDB.fullmatch(line)
        if not match:
            raise _too_few(path, number, line, "name.avi and 0, 1 or 2 as in HMDB-51's lists")
        label = _folder_label("hmdb51", folder, names)
        yield Row(path, number, f"{folder}/{match['name']}", label, _HMDB_FLAGS[match["flag"]])


def _folder_label(dataset: str, folder: str, names: Sequence[str] | None) -> str:
    return folder if names and folder in names else class_name(dataset, folder)


# --- Kinetics: a header, and columns that identify a part of a YouTube video ---------------------


def _kinetics_rows(path: str, lines: _Lines) -> Iterator[Row]:
    header = _split_commas(lines[0].text)
    for number, line in lines[1:]:
        row = dict(zip(header, _fields(path, number, line, _split_commas), strict=False))
        if not all(row.get(column) for column in _KINETICS):
            raise _too_few(path, number, line, ", ".join(_KINETICS))
        times = [row[column] for column in ("time_start", "time_end")]
        try:
            start, end = (int(float(time)) for time in times)
        except (ValueError, OverflowError) as error:
            raise AnnotationError(
                f"{path}, line {number}: times {times} of {row['youtube_id']!r}; expected seconds."
            ) from error
        name = f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4"
        subset = row.get("split") or None
        yield Row(path, number, name, row["label"], _KINETICS_SUBSETS.get(subset or "", subset))


# --- path,label --------------------------------------------------------------------------------

_PATH_COLUMNS = (
    *("path", "video_path", "file_path", "filepath", "filename", "file_name", "file", "video"),
    *("video_name", "clip", "clip_path", "image", "image_path", "name"),
)
_LABEL_COLUMNS = (
    *("label", "class_name", "classname", "label_name", "class", "labels", "category", "action"),
    *("target", "caption", "text", "tag", "class_id", "label_id", "class_index"),
)
_FILE_SUFFIXES = VIDEO_SUFFIXES | {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
_PATH_FIRST = re.compile(
    rf"(?P<path>\S.*(?:{'|'.join(map(re.escape, sorted(_FILE_SUFFIXES)))}))\s+(?P<label>\S.*)",
    re.IGNORECASE,
)
_Splitter = Callable[[str], list[str]]


def _plain_rows(path: str, lines: _Lines, names: Sequence[str] | None) -> Iterator[Row]:
    split = _splitter(lines[0].text, names)
    rows = [(line, _fields(path, line.number, line.text, split)) for line in lines]
    columns = _header(rows[0][1], names)
    if columns is not None:
        rows, width = rows[1:], 1 + max(columns)
    else:
        columns, width = (0, 1), 2
        rows = [(line, _two_fields(line, fields, names)) for line, fields in rows]
        _require_plain_rows(path, rows)
    for line, fields in rows:
        if len(fields) < width or not all(fields[column] for column in columns):
            raise _too_few(path, line.number, line.text, "a path and a label")
        yield Row(path, line.number, fields[columns[0]], fields[columns[1]])


def _splitter(first: str, names: Sequence[str] | None) -> _Splitter:
    """Return the function that splits lines, chosen by the separator in the first line."""
    spaces = partial(_split_spaces, names=names)
    if "\t" in first:
        return lambda line: _split(line, "\t") if "\t" in line else spaces(line)
    for separator in (",", ";"):
        if separator in first:
            return partial(_split, separator=separator)
    return spaces


def _header(fields: list[str], names: Sequence[str] | None) -> tuple[int, int] | None:
    """Return the columns of path and label if the first line is a header, else ``None``."""
    titles = [re.sub(r"[\s-]+", "_", field.casefold()) for field in fields]
    paths = [titles.index(title) for title in _PATH_COLUMNS if title in titles]
    labels = [titles.index(title) for title in _LABEL_COLUMNS if title in titles]
    if not paths or not labels or ("path" not in titles and fields[labels[0]] in (names or ())):
        return None
    return paths[0], labels[0]


def _two_fields(line: Line, fields: list[str], names: Sequence[str] | None) -> list[str]:
    """Return the path and the label of a line that has more separators, if the label is known."""
    if "\t" in line.text:
        fields = [field for field in fields if field]  # tabs that align columns
    for separator in (",", ";"):
        path, _, rest = line.text.partition(separator)
        if len(fields) > 2 and rest.strip() in (names or ()):
            return [path.strip(), rest.strip()]
    return fields


def _require_plain_rows(path: str, rows: list[tuple[Line, list[str]]]) -> None:
    """Check lines without a header.

    Raises:
        AnnotationError: the first line is a header with unknown titles, the label stands before
            the path, or a label has a separator that is not in quotes.
    """
    (first, fields), others = rows[0], rows[1:]
    if len(fields) > 1 and _is_file(fields[1]) and not _is_file(fields[0]):
        raise AnnotationError(
            f"{path}, line {first.number}: {first.text!r} has the label before the path. Write "
            "path,label in each line, or a first line label,path."
        )
    if others and not _is_file(fields[0]) and all(_is_file(other[0]) for _, other in others):
        raise AnnotationError(
            f"{path}, line {first.number}: {first.text!r} looks like a header with unknown titles. "
            "Name the columns path and label, or remove the line."
        )
    if len({len(row) for _, row in rows if len(row) > 1}) > 1:
        line, _ = max(rows, key=lambda row: len(row[1]))
        raise AnnotationError(
            f"{path}, line {line.number}: {line.text!r} has more fields than other lines. Put a "
            "path or a label with a separator in double quotes."
        )


def _is_file(field: str) -> bool:
    return os.path.splitext(field)[1].lower() in _FILE_SUFFIXES


def _fields(path: str, number: int, line: str, split: _Splitter) -> list[str]:
    try:
        return split(line)
    except csv.Error as error:
        raise AnnotationError(f"{path}, line {number}: {error} in {line!r}.") from error


def _split(line: str, separator: str) -> list[str]:
    reader = csv.reader([line], delimiter=separator, skipinitialspace=True)
    return [field.strip() for field in next(reader)]


def _split_commas(line: str) -> list[str]:
    return _split(line, ",")


def _split_spaces(line: str, names: Sequence[str] | None) -> list[str]:
    words = line.split()
    if len(words) == 2:
        return words
    # The label is what follows the extension of the path: a label can have several words.
    match = _PATH_FIRST.fullmatch(line)
    if match is not None:
        label = match["label"]
        if " " in label and all(word.isdigit() for word in label.split()):
            raise csv.Error("several numbers after the path; expected a path and a label")
        return [match["path"], label]
    endings = [name for name in names or () if line.endswith(" " + name)]
    if endings:
        label = max(endings, key=len)
        return [line[: -len(label)].strip(), label]
    return line.rsplit(maxsplit=1)
