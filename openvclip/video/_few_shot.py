"""Training splits with few videos of each class: the settings of ViFi-CLIP."""

from __future__ import annotations

import os
import random
from collections import Counter
from typing import NamedTuple

from openvclip.errors import ProtocolError, did_you_mean
from openvclip.video._splits import DATA_SETS, Split, find_videos_of, read_split, wrong_count

__all__ = ["BaseToNovel", "FewShot", "base_to_novel", "few_shot"]

# Number of training videos and of test videos in the official split 1.
_FIRST_SPLIT = {"ucf101": (9537, 3783), "hmdb51": (3570, 1530)}


class BaseToNovel(NamedTuple):
    """The splits of ViFi-CLIP's base-to-novel setting.

    A model is trained on the base classes and tested on both the base and the novel classes.

    Attributes:
        train: videos of the base classes from the training list of split 1.
        base: videos of the base classes from the test list of split 1.
        novel: videos of the novel classes from the test list of split 1.
    """

    train: Split
    base: Split
    novel: Split


class FewShot(NamedTuple):
    """The splits of the few-shot setting.

    Attributes:
        train: K videos of each class from the training list of split 1.
        test: the test list of split 1.
    """

    train: Split
    test: Split


def base_to_novel(
    dataset: str,
    *,
    annotations: str | os.PathLike[str],
    shots: int | None = 16,
    seed: int = 1,
    videos: str | os.PathLike[str] | None = None,
) -> BaseToNovel:
    """Build the splits of ViFi-CLIP's base-to-novel setting.

    The classes are sorted by the number of their videos in the training list of split 1. Classes
    with the same number are sorted by name. The first ``n // 2`` classes are novel, the others are
    base classes. The training videos are drawn with ``seed``. They are not the training videos of
    ViFi-CLIP, which publishes lists but not the rule by which it drew them.

    Args:
        dataset: ``"ucf101"`` or ``"hmdb51"``.
        annotations: see :func:`load`.
        shots: number of training videos of each base class; ``None`` takes all training videos.
        seed: seed of the draw. The paper reports the mean over three draws.
        videos: see :func:`load`.

    Raises:
        ProtocolError: ``dataset`` is not known, annotation files are missing or incomplete, or a
            class has fewer videos than ``shots``.

    Source: ViFi-CLIP (Rasheed et al., CVPR 2023); its released class lists follow this rule.
    """
    train, test = _first_split(dataset, annotations)
    names = train.class_names
    counts = Counter(class_index for _, class_index in train.samples)
    order = sorted(range(len(names)), key=lambda index: (counts[index], names[index]))
    half = len(names) // 2
    novel, base = sorted(order[:half]), sorted(order[half:])
    title = f"{dataset}-base-to-novel"
    splits = [
        _draw(train.restricted(base, f"{title}-train"), shots, seed),
        test.restricted(base, f"{title}-base"),
        test.restricted(novel, f"{title}-novel"),
    ]
    # Accuracies are averaged over the splits of a protocol. A mean over base and novel classes has
    # no meaning, so each split is its own protocol.
    splits = [split._replace(protocol=split.name) for split in splits]
    return BaseToNovel(*find_videos_of(splits, videos))


def few_shot(
    dataset: str,
    *,
    annotations: str | os.PathLike[str],
    shots: int | None,
    seed: int = 1,
    videos: str | os.PathLike[str] | None = None,
) -> FewShot:
    """Build the splits of the few-shot setting: some training videos and all test videos.

    With the same seed, the videos of fewer shots are a subset of the videos of more shots.

    Args:
        dataset: ``"ucf101"`` or ``"hmdb51"``.
        annotations: see :func:`load`.
        shots: number of training videos of each class. The papers use 2, 4, 8 and 16. ``None``
            takes all training videos.
        seed: seed of the draw.
        videos: see :func:`load`.

    Raises:
        ProtocolError: see :func:`base_to_novel`.

    Source: ViFi-CLIP (Rasheed et al., CVPR 2023).
    """
    train, test = _first_split(dataset, annotations)
    drawn = _draw(train._replace(name=f"{dataset}-few-shot-train"), shots, seed)
    test = test._replace(name=f"{dataset}-few-shot-test")
    return FewShot(*find_videos_of([drawn, test], videos))


def _first_split(dataset: str, annotations: str | os.PathLike[str]) -> tuple[Split, Split]:
    """Read the training list and the test list of split 1, which must be complete."""
    if dataset not in _FIRST_SPLIT:
        known = ", ".join(map(repr, _FIRST_SPLIT))
        raise ProtocolError(
            f"dataset={dataset!r} has no few-shot splits: choose one of {known}"
            f"{did_you_mean(dataset, _FIRST_SPLIT)}."
        )
    path = DATA_SETS[dataset].find(dataset, annotations)
    train, test = (
        read_split(f"{dataset} {subset} list 1", path, subset=subset)
        for subset in ("train", "test")
    )
    for split, expected in zip((train, test), _FIRST_SPLIT[dataset], strict=True):
        if len(split.samples) != expected:
            raise wrong_count(split.name, len(split.samples), expected, expected)
    return train, test


def _draw(split: Split, shots: int | None, seed: int) -> Split:
    """Draw ``shots`` videos of each class."""
    if shots is None:
        return split
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise ProtocolError(f"shots={shots!r}: expected a whole number of at least 1.")
    paths_of: list[list[str]] = [[] for _ in split.class_names]
    for path, class_index in split.samples:
        paths_of[class_index].append(path)
    samples: list[tuple[str, int]] = []
    for class_index, name in enumerate(split.class_names):
        paths = sorted(paths_of[class_index])
        if len(paths) < shots:
            raise ProtocolError(
                f"shots={shots}: class {name!r} has only {len(paths)} training videos."
            )
        # The class name is part of the seed, so the draw does not depend on the other classes.
        random.Random(f"{seed}/{name}").shuffle(paths)
        samples.extend((path, class_index) for path in paths[:shots])
    return split._replace(samples=samples)
