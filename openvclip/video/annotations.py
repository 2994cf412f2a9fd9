"""Read annotations: ``path,label`` files and the official lists of the data sets."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from openvclip.errors import AnnotationError, did_you_mean
from openvclip.video._rows import Row, Table, read_table
from openvclip.video.files import find_videos
from openvclip.video.names import class_names as official_names

__all__ = ["Annotations", "locate_videos", "read_annotations"]


class Annotations(NamedTuple):
    """The videos of a data set and their class indices.

    Attributes:
        samples: ``(path, class index)`` of each video, in the order of the file. The paths are not
            changed.
        class_names: the class names in the order of their class indices, or ``None`` if the file
            contains only class indices.
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
    """Read a list of videos.

    The format is recognised from the first line that is not blank:

    - ``path,label`` or ``path label``: one video on each line. The separator is a tab, a comma, a
      semicolon or white space. A header such as ``path,label,...`` or ``filename,class`` can name
      the columns; other columns are ignored. A path or class name that contains the separator is
      put in double quotes. In space-separated files, the label is what follows the extension of the
      path; without an extension it is the longest class name that ends the line, or else the last
      word. A label is a class name; if no class has this name, the label is a class index from 0.
    - UCF-101: ``trainlist01.txt`` and ``testlist01.txt``, or the folder that contains them. The
      folder of a video gives its class. Paths are relative to ``UCF-101/``.
    - HMDB-51: ``brush_hair_test_split1.txt``, or the folder that contains the files of all classes.
      Videos that a split does not use are skipped. Paths begin with the folder of the class.
    - Kinetics: CSV files with the columns ``label,youtube_id,time_start,time_end,split``. These
      files contain no file names, so the path is ``<youtube_id>_<start>_<end>.mp4`` with six digits
      for each time. If ``root`` is given, :func:`locate_videos` searches for this name in ``root``.

    Args:
        path: a UTF-8 text file, or a folder of official lists. Lines that begin with ``# `` are
            comments.
        class_names: the class names in the order of their class indices. Default for UCF-101 and
            HMDB-51: the official class names. Default for other files: no class names if all labels
            are class indices; otherwise the labels, sorted by name.
        subset: ``"train"``, ``"test"`` or ``"val"``: read only the videos of this subset of an
            official list. Default: all videos.
        split: number of the official split (1, 2 or 3), if ``path`` is a folder.
        root: folder of the videos of Kinetics. Other formats ignore it.

    Returns:
        The samples and the class names.

    Raises:
        AnnotationError: the file does not exist or contains no videos, or a line has too few fields
            or an unknown class. The text names the file and the line.
        VideoNotFoundError: the list is a list of Kinetics, and the folder ``root`` does not exist.
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
    samples = [(row.path, _class_index(row, lookup, names)) for row in rows]
    if table.guessed and root is not None:
        samples = locate_videos(samples, root)
    return Annotations(samples, names)


def locate_videos(
    samples: Sequence[tuple[str, int]], root: str | os.PathLike[str]
) -> list[tuple[str, int]]:
    """Find the videos of a list in a folder.

    A path that exists below ``root`` is kept. Any other path is replaced by the video file with the
    same name in any subfolder and with any extension. If no file has this name, the path is kept.
    Copies of Kinetics differ in subfolders and extensions: some copies have no subfolders, some
    have one subfolder for each class, and some have numbered subfolders. The files are MP4, MKV or
    WebM files.

    Args:
        samples: ``(path, class index)`` pairs.
        root: folder of the videos.

    Returns:
        ``(path relative to root, class index)`` pairs in the same order.

    Raises:
        VideoNotFoundError: the folder ``root`` does not exist.
    """
    files = find_videos(root)
    exact, by_name = set(files), {_stem(path): path for path in reversed(files)}
    return [
        (path if os.path.normpath(path) in exact else by_name.get(_stem(path), path), class_index)
        for path, class_index in samples
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
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise AnnotationError(
            f"class_names holds {repeated} more than once; every class needs its own name."
        )
    return names


def _is_index(label: str) -> bool:
    return label.isascii() and label.isdigit()


def _class_index(row: Row, lookup: dict[str, int], names: Sequence[str] | None) -> int:
    if row.label in lookup:
        return lookup[row.label]
    if not _is_index(row.label):
        raise AnnotationError(
            f"{row.location}: unknown class {row.label!r}{did_you_mean(row.label, lookup)}; "
            f"expected one of the {len(lookup)} class names, or a class index."
        )
    index = int(row.label)
    if names is not None and index >= len(names):
        raise AnnotationError(
            f"{row.location}: class index {index} of {row.path!r}; there are {len(names)} classes, "
            f"so the largest class index is {len(names) - 1}."
        )
    return index
