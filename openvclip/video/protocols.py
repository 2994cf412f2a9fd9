"""The splits on which the papers report, built from the official annotation files.

- ``ucf101-ep1``, ``hmdb51-ep1``: ten random halves of the classes; mean and standard deviation of
  top-1.
- ``ucf101-ep2``, ``hmdb51-ep2``: all classes and all videos (HMDB-51: all videos of split 1).
- ``ucf101-ep3``, ``hmdb51-ep3``: the three official test splits; mean and standard deviation of
  top-1.
- ``kinetics600``: three sets of 160 classes that Kinetics-400 does not have, on the validation
  videos; mean and standard deviation of top-1 and top-5.

Source: Section 4.1 of the Open-VCLIP paper, and the released code of Open-VCLIP and ViFi-CLIP.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass

from openvclip.errors import ProtocolError, did_you_mean
from openvclip.video._few_shot import BaseToNovel, FewShot, base_to_novel, few_shot
from openvclip.video._splits import DATA_SETS, Split, find_videos_of, read_split, wrong_count
from openvclip.video.names import class_name, class_names

__all__ = [
    "PROTOCOLS",
    "BaseToNovel",
    "FewShot",
    "Split",
    "base_to_novel",
    "class_name",
    "class_names",
    "few_shot",
    "load",
    "published_videos",
]

_EP1_SEED, _EP1_HALVES = 2023, 10


# --- builders of splits, from a data set and the path of its official lists ----------------------


def _all_videos(dataset: str, path: str) -> list[Split]:
    return [read_split(dataset, path)]


def _halves_of_classes(dataset: str, path: str) -> list[Split]:
    whole = read_split(dataset, path)
    generator = random.Random(_EP1_SEED)
    halves = []
    for _ in range(_EP1_HALVES):
        order = list(range(len(whole.class_names)))
        generator.shuffle(order)
        halves.append(whole.restricted(sorted(order[: len(order) // 2]), dataset))
    return halves


def _test_lists(dataset: str, path: str) -> list[Split]:
    return [read_split(dataset, path, subset="test", number=number) for number in (1, 2, 3)]


def _new_classes(dataset: str, path: str) -> list[Split]:
    whole = read_split(dataset, path, subset="val")
    splits = []
    for number in (1, 2, 3):
        names = class_names(f"{dataset}-{number}")
        absent = sorted(set(names) - set(whole.class_names))
        if absent:
            raise ProtocolError(
                f"{path}: has no videos of {len(absent)} of the 160 classes of set {number}: "
                f"{absent[:5]}. Is it the validation list of Kinetics-600?"
            )
        splits.append(whole.restricted([whole.class_names.index(name) for name in names], dataset))
    return splits


# --- the table of protocols ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Protocol:
    """A protocol.

    Attributes:
        dataset: data set of the protocol, a key of ``DATA_SETS``.
        build: function that builds the splits.
        videos: number of videos of each split in the papers.
        most: largest number of videos that a split can have; default: the number in the papers.
    """

    dataset: str
    build: Callable[[str, str], list[Split]]
    videos: tuple[int, ...]
    most: int | None = None


_UCF_HALVES = (6483, 6658, 6625, 6696, 6676, 6622, 6605, 6636, 6504, 6660)
_PROTOCOLS: dict[str, _Protocol] = {
    "ucf101-ep1": _Protocol("ucf101", _halves_of_classes, _UCF_HALVES),
    "ucf101-ep2": _Protocol("ucf101", _all_videos, (13320,)),
    "ucf101-ep3": _Protocol("ucf101", _test_lists, (3783, 3734, 3696)),
    "hmdb51-ep1": _Protocol("hmdb51", _halves_of_classes, (2500,) * 10),
    "hmdb51-ep2": _Protocol("hmdb51", _all_videos, (5100,)),
    "hmdb51-ep3": _Protocol("hmdb51", _test_lists, (1530,) * 3),
    # Kinetics takes 50 validation videos of each class from YouTube. Some were deleted later.
    "kinetics600": _Protocol("kinetics600", _new_classes, (7276, 7226, 7261), most=160 * 50),
}
PROTOCOLS: tuple[str, ...] = tuple(_PROTOCOLS)
"""The protocols that :func:`load` can build."""


def load(
    name: str,
    *,
    annotations: str | os.PathLike[str],
    videos: str | os.PathLike[str] | None = None,
    allow_incomplete: bool = False,
) -> list[Split]:
    """Build the splits of a protocol.

    For UCF-101 and HMDB-51 the splits contain exactly the videos of the papers. Kinetics-600 is
    different, because its videos disappear from YouTube over time. Its lists contain more than the
    7276, 7226 and 7261 videos of the Open-VCLIP paper (:func:`published_videos`). Accuracies are
    comparable only as far as the videos are the same.

    Args:
        name: one of :data:`PROTOCOLS`.
        annotations: the folder of the official annotation files, or its parent folder:
            ``ucfTrainTestlist/`` or ``testTrainMulti_7030_splits/``. For Kinetics-600: the
            validation CSV, or its folder.
        videos: the folder of the videos. If it is given, a video that does not exist at its path is
            searched for by its name; its subfolder and its extension can differ from the
            annotations (see :func:`openvclip.video.annotations.locate_videos`).
        allow_incomplete: whether the annotations may name fewer videos than the protocol has.

    Returns:
        10 splits for EP1, 1 split for EP2, and 3 splits for EP3 and for Kinetics-600.

    Raises:
        ProtocolError: ``name`` is not known, there are no annotation files, or the number of videos
            is not the number of the protocol.
        AnnotationError: a line of an annotation file cannot be parsed.
        VideoNotFoundError: the folder ``videos`` does not exist.
    """
    protocol = _protocol(name)
    path = DATA_SETS[protocol.dataset].find(protocol.dataset, annotations)
    splits = []
    for number, split in enumerate(protocol.build(protocol.dataset, path), start=1):
        split_name = name if len(protocol.videos) == 1 else f"{name}-{number}"
        splits.append(split._replace(name=split_name, protocol=name))
    for split, published in zip(splits, protocol.videos, strict=True):
        count, most = len(split.samples), protocol.most or published
        if count > most or (count < published and not allow_incomplete):
            hint = "--allow-incomplete or allow_incomplete=True accepts fewer videos."
            raise wrong_count(split.name, count, published, most, hint)
    return find_videos_of(splits, videos)


def published_videos(name: str) -> list[int]:
    """Return the number of videos of each split of a protocol in the papers.

    Args:
        name: one of :data:`PROTOCOLS`.

    Raises:
        ProtocolError: ``name`` is not known.
    """
    return list(_protocol(name).videos)


def _protocol(name: str) -> _Protocol:
    if name not in _PROTOCOLS:
        raise ProtocolError(
            f"protocol {name!r} is not known: choose one of {', '.join(map(repr, PROTOCOLS))}"
            f"{did_you_mean(name, PROTOCOLS)}."
        )
    return _PROTOCOLS[name]
