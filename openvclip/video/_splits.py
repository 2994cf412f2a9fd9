"""Splits of a data set, and the places of the official lists from which splits are made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from openvclip.errors import ProtocolError, near_path
from openvclip.video.annotations import locate_videos, read_annotations

__all__ = ["DATA_SETS", "OfficialLists", "Split", "find_videos_of", "read_split", "wrong_count"]


class Split(NamedTuple):
    """Videos, and the classes that a model has to distinguish on these videos.

    Attributes:
        name: name of the split, such as ``"ucf101-ep1-1"`` to ``"ucf101-ep1-10"``, or
            ``"ucf101-ep2"``.
        class_names: class names as in the prompts of the released code, in the order of their class
            indices.
        samples: ``(path, class index)`` of each video. UCF-101: ``Archery/v_Archery_g01_c01.avi``,
            below ``UCF-101/``. HMDB-51: ``brush_hair/name.avi``. Kinetics-600:
            ``<youtube_id>_000010_000020.mp4``. See the argument ``videos`` of :func:`load`.
        protocol: name of the protocol of the split, such as ``"ucf101-ep1"``. Mean and standard
            deviation are computed over the splits of one protocol.
    """

    name: str
    class_names: list[str]
    samples: list[tuple[str, int]]
    protocol: str = ""

    def restricted(self, class_indices: Sequence[int], name: str) -> Split:
        """Return a split with the videos of some classes.

        Args:
            class_indices: the classes to keep; they get the class indices 0, 1, ... in this order.
            name: name of the new split.
        """
        new = {old: index for index, old in enumerate(class_indices)}
        samples = [(path, new[old]) for path, old in self.samples if old in new]
        return Split(name, [self.class_names[old] for old in class_indices], samples)


@dataclass(frozen=True)
class OfficialLists:
    """The places of the official lists of a data set in the usual downloads.

    Attributes:
        folders: folders to search, relative to the folder that the user gives.
        files: file names to search for. One existing file is enough.
        single: whether the data set has a single file of annotations instead of a folder of lists.
    """

    folders: tuple[str, ...]
    files: tuple[str, ...]
    single: bool = False

    def find(self, dataset: str, annotations: str | os.PathLike[str]) -> str:
        """Return the folder of the official lists, or the file if there is a single file.

        Raises:
            ProtocolError: there are no official lists.
        """
        start = os.fspath(annotations)
        if self.single and os.path.isfile(start):
            return start
        for folder in self.folders:
            for file in self.files:
                path = os.path.join(start, folder, file)
                if os.path.isfile(path):
                    return path if self.single else os.path.dirname(path)
        searched = [os.path.join(start, folder) for folder in self.folders]
        raise ProtocolError(
            f"annotations={start!r} holds no official lists of {dataset}{near_path(start)}: "
            f"looked for {', '.join(self.files)} in {', '.join(searched)}. Give the folder into "
            "which you unpacked the official annotations."
        )


DATA_SETS: dict[str, OfficialLists] = {
    "ucf101": OfficialLists(("", "ucfTrainTestlist"), ("testlist01.txt",)),
    "hmdb51": OfficialLists(
        (
            "",
            "testTrainMulti_7030_splits",
            os.path.join("test_train_splits", "testTrainMulti_7030_splits"),
        ),
        ("brush_hair_test_split1.txt",),
    ),
    "kinetics600": OfficialLists(
        ("", "annotations", "kinetics600"),
        (
            "validate.csv",  # DeepMind
            "val.csv",  # CVDF, torchvision
            "val.txt",
            "kinetics600_val.csv",
            "kinetics_600_val.csv",
            "kinetics_val.csv",  # MMAction2
        ),
        single=True,
    ),
}
"""The official lists of each data set."""


def read_split(name: str, path: str, *, subset: str | None = None, number: int = 1) -> Split:
    """Read a split from official lists; see :func:`openvclip.video.read_annotations`."""
    samples, class_names = read_annotations(path, subset=subset, split=number)
    return Split(name, list(class_names or ()), samples)


def find_videos_of(splits: Sequence[Split], videos: str | os.PathLike[str] | None) -> list[Split]:
    """Return the splits with the paths of the files in ``videos``; ``None`` changes no path."""
    if videos is None:
        return list(splits)
    # One call for all splits, because each call searches the whole folder.
    samples = iter(locate_videos([sample for split in splits for sample in split.samples], videos))
    return [split._replace(samples=list(islice(samples, len(split.samples)))) for split in splits]


def wrong_count(name: str, count: int, least: int, most: int, hint: str = "") -> ProtocolError:
    """Return the error for lists with a wrong number of videos."""
    expected = f"{least}" if most == least else f"{least} to {most}"
    reason = (
        f"The annotations are incomplete; unpack them again. {hint}"
        if count < least
        else "These are not the official lists of this protocol."
    )
    return ProtocolError(
        f"{name}: the annotations name {count} videos; expected {expected}. {reason.strip()}"
    )
