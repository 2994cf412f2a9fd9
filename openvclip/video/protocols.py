"""The splits on which the papers report, from the official annotation files of a download.

- ``ucf101-ep1``, ``hmdb51-ep1``: ten random halves of the classes, mean and std of top-1.
- ``ucf101-ep2``, ``hmdb51-ep2``: all classes and all videos (HMDB-51: those that split 1 uses).
- ``ucf101-ep3``, ``hmdb51-ep3``: the three official test splits, mean and std of top-1.
- ``kinetics600``: three sets of 160 classes that Kinetics-400 does not have, on the validation
  videos; mean and std of top-1 and top-5.

Source: Section 4.1 of the Open-VCLIP paper, and the released code of Open-VCLIP and ViFi-CLIP.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

from openvclip.errors import ProtocolError
from openvclip.video.annotations import Annotations, locate_videos, read_annotations
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

_Path = str | os.PathLike[str]
_Samples = list[tuple[str, int]]

_PUBLISHED: dict[str, tuple[int, ...]] = {
    "ucf101-ep1": (6483, 6658, 6625, 6696, 6676, 6622, 6605, 6636, 6504, 6660),
    "ucf101-ep2": (13320,),
    "ucf101-ep3": (3783, 3734, 3696),
    "hmdb51-ep1": (2500,) * 10,
    "hmdb51-ep2": (5100,),
    "hmdb51-ep3": (1530, 1530, 1530),
    "kinetics600": (7276, 7226, 7261),
}
PROTOCOLS: tuple[str, ...] = tuple(_PUBLISHED)
"""The names that :func:`load` takes."""

_TRAIN_VIDEOS = {"ucf101": 9537, "hmdb51": 3570}  # of split 1
_EP1_SEED, _EP1_HALVES = 2023, 10
# Kinetics takes 50 validation videos of a class from YouTube, some of which went away later.
_K600_MOST = 160 * 50

_FOLDERS = {
    "ucf101": ("", "ucfTrainTestlist"),
    "hmdb51": (
        "",
        "testTrainMulti_7030_splits",
        os.path.join("test_train_splits", "testTrainMulti_7030_splits"),
    ),
    "kinetics600": ("", "annotations", "kinetics600"),
}
_FILES = {
    "ucf101": ("testlist01.txt",),
    "hmdb51": ("brush_hair_test_split1.txt",),
    "kinetics600": (
        "validate.csv",  # DeepMind
        "val.csv",  # CVDF, torchvision
        "val.txt",
        "kinetics600_val.csv",
        "kinetics_600_val.csv",
        "kinetics_val.csv",  # MMAction2
    ),
}


class Split(NamedTuple):
    """Videos and the classes that a model has to tell apart on them.

    Attributes:
        name: such as ``"ucf101-ep1-1"`` to ``"ucf101-ep1-10"``; ``"ucf101-ep2"``.
        class_names: as the prompts spell them, in the order of their indices.
        samples: ``(path, class index)`` of each video. UCF-101: ``Archery/v_Archery_g01_c01.avi``,
            below ``UCF-101/``; HMDB-51: ``brush_hair/name.avi``; Kinetics-600:
            ``<youtube_id>_000010_000020.mp4``. See ``videos`` of :func:`load`.
        protocol: what the split is a part of, such as ``"ucf101-ep1"``: mean and standard
            deviation are those of the splits of one protocol.
    """

    name: str
    class_names: list[str]
    samples: _Samples
    protocol: str = ""


class BaseToNovel(NamedTuple):
    """ViFi-CLIP's test of what a model keeps of classes that it was not trained on.

    Attributes:
        train: videos of the base classes from the training list of split 1.
        base: the videos of the base classes in the test list of split 1.
        novel: the videos of the novel classes in the test list of split 1.
    """

    train: Split
    base: Split
    novel: Split


class FewShot(NamedTuple):
    """Some training videos of each class, and the test videos of all.

    Attributes:
        train: K videos of each class from the training list of split 1.
        test: the test list of split 1.
    """

    train: Split
    test: Split


def load(
    name: str, *, annotations: _Path, videos: _Path | None = None, allow_incomplete: bool = False
) -> list[Split]:
    """Builds the splits of a protocol.

    Args:
        name: one of :data:`PROTOCOLS`.
        annotations: the folder of the official annotation files, or the one that it lies in:
            ``ucfTrainTestlist/``, ``testTrainMulti_7030_splits/``; for Kinetics-600 the validation
            CSV, or its folder.
        videos: the folder of the videos. Then a video that lies there under another folder or
            ending than the one in the annotations is found by its name (see
            :func:`openvclip.video.annotations.locate_videos`).
        allow_incomplete: take annotations of fewer videos than the protocol has.

    Returns:
        10 splits for EP1, 1 for EP2, 3 for EP3 and Kinetics-600. For UCF-101 and HMDB-51 they hold
        exactly the videos of the papers. Of Kinetics-600 videos have gone from YouTube at different
        times: the lists name more than the 7276, 7226 and 7261 on which the Open-VCLIP paper
        reports (:func:`published_videos`), and numbers are comparable to the extent that the
        videos are the same.

    Raises:
        ProtocolError: an unknown name; no annotation files where they were looked for; or another
            number of videos than the protocol has.
        AnnotationError: a line that can't be understood.
        VideoNotFoundError: there is no folder ``videos``.
    """
    _check_name(name)
    dataset, _, kind = name.partition("-")
    built = _BUILDERS[kind](dataset, _find(dataset, annotations))
    splits = [split._replace(protocol=name) for split in built]
    if len(splits) > 1:
        splits = [split._replace(name=f"{name}-{i}") for i, split in enumerate(splits, 1)]
    for split, least in zip(splits, _PUBLISHED[name], strict=True):
        found = len(split.samples)
        most = _K600_MOST if name == "kinetics600" else least
        if found > most or (found < least and not allow_incomplete):
            raise _wrong_count(split.name, found, least, most, "allow_incomplete=True takes it so.")
    return _located(splits, videos)


def published_videos(name: str) -> list[int]:
    """How many videos each split of a protocol has in the papers' evaluation.

    Raises:
        ProtocolError: an unknown name.
    """
    _check_name(name)
    return list(_PUBLISHED[name])


def base_to_novel(
    dataset: str,
    *,
    annotations: _Path,
    shots: int | None = 16,
    seed: int = 1,
    videos: _Path | None = None,
) -> BaseToNovel:
    """ViFi-CLIP's base and novel classes: those with fewer training videos are novel.

    The classes are sorted by the number of their videos in the training list of split 1, ties in
    alphabetical order; the first ``n // 2`` are novel, the others base. The training videos are
    drawn anew by ``seed``: the published draws are lists without a rule.

    Args:
        dataset: ``"ucf101"`` or ``"hmdb51"``.
        annotations: see :func:`load`.
        shots: training videos of each base class; all of them for ``None``.
        seed: the draw; the paper averages over three.
        videos: see :func:`load`.

    Raises:
        ProtocolError: another data set, annotation files that are missing or incomplete, or a
            class with fewer videos than ``shots``.

    Source: ViFi-CLIP (Rasheed et al., CVPR 2023), whose released class lists follow the rule.
    """
    train, test = _first_split(dataset, annotations)
    names = train.class_names
    counts = Counter(label for _, label in train.samples)
    order = sorted(range(len(names)), key=lambda index: (counts[index], names[index]))
    half = len(names) // 2
    novel, base = sorted(order[:half]), sorted(order[half:])
    title = f"{dataset}-base-to-novel"
    parts = [
        _drawn(_restricted(train, base, f"{title}-train"), shots, seed),
        _restricted(test, base, f"{title}-base"),
        _restricted(test, novel, f"{title}-novel"),
    ]
    # A mean over base and novel classes would mean nothing.
    return BaseToNovel(*_located([part._replace(protocol=part.name) for part in parts], videos))


def few_shot(
    dataset: str,
    *,
    annotations: _Path,
    shots: int | None,
    seed: int = 1,
    videos: _Path | None = None,
) -> FewShot:
    """``shots`` training videos of each class, the papers' 2, 4, 8 and 16; all test videos.

    With one seed, fewer shots are a part of more.

    Args:
        dataset: ``"ucf101"`` or ``"hmdb51"``.
        annotations: see :func:`load`.
        shots: training videos of each class; all of them for ``None``.
        seed: the draw.
        videos: see :func:`load`.

    Raises:
        ProtocolError: see :func:`base_to_novel`.

    Source: ViFi-CLIP (Rasheed et al., CVPR 2023).
    """
    train, test = _first_split(dataset, annotations)
    shown = _drawn(train._replace(name=f"{dataset}-few-shot-train"), shots, seed)
    return FewShot(*_located([shown, test._replace(name=f"{dataset}-few-shot-test")], videos))


# --- the protocols -----------------------------------------------------------------------------


def _all(dataset: str, path: str) -> list[Split]:
    return [_split(f"{dataset}-ep2", read_annotations(path))]


def _halves(dataset: str, path: str) -> list[Split]:
    (whole,) = _all(dataset, path)
    generator = random.Random(_EP1_SEED)
    halves = []
    for _ in range(_EP1_HALVES):
        order = list(range(len(whole.class_names)))
        generator.shuffle(order)
        halves.append(_restricted(whole, sorted(order[: len(order) // 2]), whole.name))
    return halves


def _test_lists(dataset: str, path: str) -> list[Split]:
    lists = [read_annotations(path, subset="test", split=number) for number in (1, 2, 3)]
    return [_split(dataset, found) for found in lists]


def _new_classes(dataset: str, path: str) -> list[Split]:
    found = _split(dataset, read_annotations(path, subset="val"))
    splits = []
    for number in (1, 2, 3):
        names = class_names(f"{dataset}-{number}")
        absent = sorted(set(names) - set(found.class_names))
        if absent:
            raise ProtocolError(
                f"{path}: has no videos of {len(absent)} of the 160 classes of set {number}: "
                f"{absent[:5]}. Is it the validation list of Kinetics-600?"
            )
        classes = [found.class_names.index(name) for name in names]
        splits.append(_restricted(found, classes, found.name))
    return splits


_BUILDERS: dict[str, Callable[[str, str], list[Split]]] = {
    "ep1": _halves,
    "ep2": _all,
    "ep3": _test_lists,
    "": _new_classes,
}


def _first_split(dataset: str, annotations: _Path) -> tuple[Split, Split]:
    """The training and the test list of split 1, complete."""
    if dataset not in _TRAIN_VIDEOS:
        known = ", ".join(map(repr, _TRAIN_VIDEOS))
        raise ProtocolError(f"dataset={dataset!r} has no such splits: choose one of {known}.")
    path = _find(dataset, annotations)
    train, test = (
        _split(f"{dataset} {subset} list 1", read_annotations(path, subset=subset))
        for subset in ("train", "test")
    )
    wanted = (_TRAIN_VIDEOS[dataset], _PUBLISHED[f"{dataset}-ep3"][0])
    for split, count in zip((train, test), wanted, strict=True):
        if len(split.samples) != count:
            raise _wrong_count(split.name, len(split.samples), count, count)
    return train, test


# --- their parts -------------------------------------------------------------------------------


def _split(name: str, found: Annotations) -> Split:
    return Split(name, list(found.class_names or ()), found.samples)


def _restricted(split: Split, classes: Sequence[int], name: str) -> Split:
    """The videos of some classes, numbered anew in the order given."""
    new = {old: index for index, old in enumerate(classes)}
    samples = [(path, new[label]) for path, label in split.samples if label in new]
    return Split(name, [split.class_names[old] for old in classes], samples)


def _drawn(split: Split, shots: int | None, seed: int) -> Split:
    if shots is None:
        return split
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise ProtocolError(f"shots={shots!r}: expected a whole number of at least 1.")
    by_class: list[list[str]] = [[] for _ in split.class_names]
    for path, label in split.samples:
        by_class[label].append(path)
    samples: _Samples = []
    for label, (name, listed) in enumerate(zip(split.class_names, by_class, strict=True)):
        paths = sorted(listed)
        if len(paths) < shots:
            raise ProtocolError(
                f"shots={shots}: class {name!r} has only {len(paths)} training videos."
            )
        # The class is part of the seed, so that its draw does not depend on the other classes.
        random.Random(f"{seed}/{name}").shuffle(paths)
        samples.extend((path, label) for path in paths[:shots])
    return split._replace(samples=samples)


def _located(splits: Sequence[Split], videos: _Path | None) -> list[Split]:
    if videos is None:
        return list(splits)
    # All at once: the folder is searched once, not ten times for EP1.
    found = iter(locate_videos([sample for split in splits for sample in split.samples], videos))
    return [split._replace(samples=list(islice(found, len(split.samples)))) for split in splits]


def _find(dataset: str, annotations: _Path) -> str:
    """The folder of the official lists, or the file of the one list."""
    given = os.fspath(annotations)
    if dataset == "kinetics600" and os.path.isfile(given):
        return given
    for folder in _FOLDERS[dataset]:
        for file in _FILES[dataset]:
            path = os.path.join(given, folder, file)
            if os.path.isfile(path):
                return path if dataset == "kinetics600" else os.path.dirname(path)
    looked = [os.path.join(given, folder) for folder in _FOLDERS[dataset]]
    raise ProtocolError(
        f"annotations={given!r} holds no official lists of {dataset}: looked for "
        f"{', '.join(_FILES[dataset])} in {', '.join(looked)}. Give the folder that the official "
        "annotations were unpacked to."
    )


def _check_name(name: str) -> None:
    if name not in _PUBLISHED:
        raise ProtocolError(
            f"protocol {name!r} is not known: choose one of {', '.join(map(repr, PROTOCOLS))}."
        )


def _wrong_count(what: str, found: int, least: int, most: int, hint: str = "") -> ProtocolError:
    expected = f"{least}" if most == least else f"{least} to {most}"
    reason = (
        f"The annotations are incomplete; unpack them again. {hint}"
        if found < least
        else "These are not the official lists of this protocol."
    )
    return ProtocolError(
        f"{what}: the annotations name {found} videos; expected {expected}. {reason.strip()}"
    )
