"""Lists of videos and their labels: ``path,label`` files, and the data sets' official ones."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from openvclip.errors import AnnotationError
from openvclip.video._rows import Row, Table, read_table
from openvclip.video.files import find_videos
from openvclip.video.names import class_names as official_names

__all__ = ["Annotations", "locate_videos", "read_annotations"]


class Annotations(NamedTuple):
    """The videos of a data set and their labels.

    Attributes:
        samples: ``(path, class index)`` of each video, in the order of the file; paths as written
            there.
        class_names: the name of each class, or ``None`` when the file holds only indices.
    """

    samples: list[tuple[str, int]]
    class_names: list[str] | None


def read_annotations(
    path: str | os.PathLike[str],
    class_names: Sequence[str] | None = None,
    *,
    subset: str | None = None,
    split: int = 1,
    root: str | os.PathLike[str] | None = None,
) -> Annotations:
    """Reads a list of videos, in a format that its first line that is not blank tells.

    - ``path,label`` or ``path label``, one video on a line; a header ``path,label,...`` may name
      the columns (further columns are left alone). In comma-separated files a path or name with a
      comma stands in double quotes; in space-separated ones the label is the last word, or the
      longest class name that ends the line. A label is a class name or, if no class is called so,
      an index from 0.
    - UCF-101's ``trainlist01.txt`` and ``testlist01.txt``, or the folder that holds them. The
      class is that of the folder; paths start below ``UCF-101/``.
    - HMDB-51's ``brush_hair_test_split1.txt``, or the folder that holds all of them. Videos that a
      split does not use are left out; paths start at the folders of the classes.
    - Kinetics' CSV files (columns ``label,youtube_id,time_start,time_end,split``). They name no
      files: a video is ``<youtube_id>_<start>_<end>.mp4`` with six digits for the times, or what
      :func:`locate_videos` finds by this name in ``root``.

    Args:
        path: a UTF-8 text file, or a folder of official lists.
        class_names: the classes in the order of their indices. Without it, they are the official
            ones for UCF-101 and HMDB-51; otherwise labels must be all indices, or all names, whose
            classes are then their sorted set.
        subset: ``"train"``, ``"test"`` or ``"val"``: only the videos that an official list gives
            to this subset. All of them by default.
        split: which of the three official splits to take from a folder.
        root: where the videos of Kinetics are; not used for the other formats.

    Returns:
        The samples, and the class names.

    Raises:
        AnnotationError: no such file, no videos in it, or a line with too few fields or an unknown
            class; the text names the file and the line.
        VideoNotFoundError: the list is one of Kinetics, and there is no folder ``root``.
    """
    names = None if class_names is None else _unique(class_names)
    table = read_table(os.fspath(path), names, split)
    rows = _of_subset(table, subset, os.fspath(path))
    if not rows:
        raise AnnotationError(f"{path}: holds no videos; expected lines of the form path,label.")
    if names is None and table.dataset is not None:
        names = official_names(table.dataset)
    if names is None and not all(_is_index(row.label) for row in rows):
        names = sorted({row.label for row in rows})
    lookup = {name: index for index, name in enumerate(names or ())}
    samples = [(row.path, _label(row, lookup, names)) for row in rows]
    if table.guessed and root is not None:
        samples = locate_videos(samples, root)
    return Annotations(samples, names)


def locate_videos(
    samples: Sequence[tuple[str, int]], root: str | os.PathLike[str]
) -> list[tuple[str, int]]:
    """Where the videos of a list lie in a download.

    A path that exists below ``root`` stays as it is. Others become that of the video file with the
    same name, whatever its folder and ending: Kinetics comes flat, in folders by class or in
    parts, as MP4, MKV or WebM. A path that is nowhere to be found stays too.

    Returns:
        ``(path relative to root, class index)`` in the same order.

    Raises:
        VideoNotFoundError: there is no folder ``root``.
    """
    there = find_videos(root)
    exact, by_name = set(there), {_stem(path): path for path in reversed(there)}
    return [
        (path if os.path.normpath(path) in exact else by_name.get(_stem(path), path), label)
        for path, label in samples
    ]


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _of_subset(table: Table, subset: str | None, path: str) -> list[Row]:
    known = sorted({row.subset for row in table.rows if row.subset} - {"unused"})
    if subset is not None and subset not in known and table.rows:
        raise AnnotationError(
            f"{path}: holds no videos of subset={subset!r}; "
            + (f"it has {', '.join(known)}." if known else "it names no subsets.")
        )
    wanted = (subset,) if subset is not None else (None, *known)
    return [row for row in table.rows if row.subset in wanted]


def _unique(class_names: Sequence[str]) -> list[str]:
    names = list(class_names)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AnnotationError(
            f"class_names holds {twice} more than once; every class needs its own name."
        )
    return names


def _is_index(label: str) -> bool:
    return label.isascii() and label.isdigit()


def _label(row: Row, lookup: dict[str, int], names: Sequence[str] | None) -> int:
    if row.label in lookup:
        return lookup[row.label]
    if not _is_index(row.label):
        raise AnnotationError(
            f"{row.place}: unknown class {row.label!r}; it is none of the {len(lookup)} class "
            "names, nor an index."
        )
    index = int(row.label)
    if names is not None and index >= len(names):
        raise AnnotationError(
            f"{row.place}: class index {index} of {row.path!r}; there are {len(names)} classes, "
            f"so at most {len(names) - 1} is possible."
        )
    return index
