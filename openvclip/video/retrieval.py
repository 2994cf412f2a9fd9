"""The data sets of text-to-video retrieval, built from their annotation files.

- ``msrvtt-1ka``: the 1k-A test set of MSR-VTT, one caption for each video.
- ``msvd``: the test set of MSVD, with all captions of each video.
- ``lsmdc``: the public test set of LSMDC.
- ``didemo``: the test set of DiDeMo. The descriptions of a video are joined to a paragraph.
- ``activitynet``: the first validation set of ActivityNet Captions, joined to paragraphs too.

Source: the released code of CLIP4Clip.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from openvclip.errors import ProtocolError, did_you_mean, listed
from openvclip.video._splits import OfficialLists, wrong_count
from openvclip.video.captions import (
    Captions,
    locate_captioned,
    read_captions,
    read_video_names,
    video_name,
)
from openvclip.video.sampling import Sampling

__all__ = ["PROTOCOLS", "RetrievalSet", "from_captions", "load", "published_videos"]


class RetrievalSet(NamedTuple):
    """Videos and their captions, and how the protocol reads both.

    Attributes:
        name: name of the protocol, such as ``"msrvtt-1ka"``.
        videos: path of each video, relative to the folder of the videos.
        captions: the captions of each video, in the order of ``videos``.
        sampling: the frames of a video: one for each second, at most ``sampling.num_frames``.
        words: the largest number of tokens of a caption, with the marks of its begin and its end.
            A longer caption is cut, and still ends with the end mark. ``None``: the length of the
            text tower.
        several: whether the protocol has several captions of a video. The metrics are then those of
            ``captions_per_video``; see :func:`openvclip.evaluation.retrieval_metrics`. They are in
            any case if a video has several captions.
    """

    name: str
    videos: list[str]
    captions: list[list[str]]
    sampling: Sampling = Sampling(num_frames=12, sampler="seconds")
    words: int | None = 32
    several: bool = False


# --- readers: from the path of the annotations to the captions of each video ---------------------


def _msvd(path: str) -> Captions:
    folder = os.path.dirname(path)
    captions = read_captions(path)
    return _of_list(captions, os.path.join(folder, "test_list.txt"))


def _didemo(path: str) -> Captions:
    names = os.path.join(os.path.dirname(path), "test_list.txt")
    captions = read_captions(path)
    return _paragraphs(_of_list(captions, names) if os.path.isfile(names) else captions)


def _activitynet(path: str) -> Captions:
    return _paragraphs(read_captions(path))


def _of_list(captions: Captions, path: str) -> Captions:
    """Return the captions of the videos that a list names, in the order of the list."""
    known = {video_name(video): texts for video, texts in captions.items()}
    names = read_video_names(path)
    missing = [name for name in names if video_name(name) not in known]
    if missing:
        raise ProtocolError(
            f"{path} names {len(names)} videos, of which {len(missing)} have no captions "
            f"({listed(missing, 10)}). Both files must be of the same data set; unpack them again."
        )
    return {name: known[video_name(name)] for name in names}


def _paragraphs(captions: Captions) -> Captions:
    return {video: [" ".join(texts)] for video, texts in captions.items()}


# --- the table of protocols ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Protocol:
    """A protocol.

    Attributes:
        lists: the places of the annotation files.
        read: function that reads the captions.
        videos: number of videos in the test set.
        frames: the largest number of frames of a video.
        words: the largest number of tokens of a caption.
        several: whether a video has several captions.
        exact: whether every copy of the data set has this number of videos.
        last_second: the second after which no frame is taken.
        prefix: the beginning of the names of videos that files can lack.
    """

    lists: OfficialLists
    read: Callable[[str], Captions]
    videos: int
    frames: int = 12
    words: int = 32
    several: bool = False
    exact: bool = True
    last_second: int | None = None
    prefix: str = ""


def _files(folder: str, *files: str) -> OfficialLists:
    return OfficialLists(("", folder, "annotations"), files, single=True)


_PROTOCOLS: dict[str, _Protocol] = {
    "msrvtt-1ka": _Protocol(
        _files(
            "msrvtt_data",
            *("MSRVTT_JSFUSION_test.csv", "msrvtt_test1k.json", "test1k.json"),
            *("MSRVTT_JSFUSION_test.json", "msrvtt_test_1k.json"),
        ),
        read_captions,
        videos=1000,
    ),
    "msvd": _Protocol(
        _files("msvd_data", "raw-captions.pkl", "raw-captions.json"),
        _msvd,
        videos=670,
        several=True,
    ),
    "lsmdc": _Protocol(
        _files("lsmdc_data", "LSMDC16_challenge_1000_publictect.csv"), read_captions, videos=1000
    ),
    "didemo": _Protocol(
        _files("didemo_data", "test_data.json"),
        _didemo,
        videos=1004,
        frames=64,
        words=64,
        exact=False,
        last_second=31,
    ),
    "activitynet": _Protocol(
        _files("activitynet_data", "val_1.json"),
        _activitynet,
        videos=4917,
        frames=64,
        words=64,
        exact=False,
        prefix="v_",
    ),
}
PROTOCOLS: tuple[str, ...] = tuple(_PROTOCOLS)
"""The retrieval protocols that :func:`load` can build."""


def load(
    name: str,
    *,
    annotations: str | os.PathLike[str],
    videos: str | os.PathLike[str] | None = None,
    allow_incomplete: bool = False,
) -> RetrievalSet:
    """Read the test set of a retrieval protocol.

    Args:
        name: one of :data:`PROTOCOLS`.
        annotations: the annotation file, or the folder that contains it. ``msrvtt-1ka``:
            ``MSRVTT_JSFUSION_test.csv``, or JSON with a caption for each of its videos. ``msvd``:
            ``raw-captions.pkl`` beside ``test_list.txt``. ``lsmdc``:
            ``LSMDC16_challenge_1000_publictect.csv``. ``didemo``: ``test_data.json`` beside
            ``test_list.txt``. ``activitynet``: ``val_1.json``.
        videos: the folder of the videos. If it is given, the file of each video is searched for by
            its name, in all subfolders and with all extensions. A video without a file keeps its
            name.
        allow_incomplete: whether the annotations may name fewer videos than the protocol has.

    Raises:
        ProtocolError: ``name`` is not known, there are no annotation files, or the number of videos
            or captions is not that of the protocol.
        AnnotationError: an annotation file can't be read.
        VideoNotFoundError: the folder ``videos`` does not exist.
    """
    protocol = _protocol(name)
    captions = protocol.read(protocol.lists.find(name, annotations))
    _require_complete(name, protocol, captions, allow_incomplete)
    names = list(captions)
    paths = names if videos is None else locate_captioned(names, videos, prefix=protocol.prefix)
    sampling = Sampling(
        num_frames=protocol.frames, sampler="seconds", last_second=protocol.last_second
    )
    texts = list(captions.values())
    return RetrievalSet(name, paths, texts, sampling, protocol.words, protocol.several)


def from_captions(
    annotations: str | os.PathLike[str], *, videos: str | os.PathLike[str] | None = None
) -> RetrievalSet:
    """Make a test set of captions of your own, with the frames of MSR-VTT 1k-A.

    A caption is cut only at the length of the text tower. A video can have several captions.

    Args:
        annotations: a file that :func:`openvclip.video.read_captions` reads.
        videos: see :func:`load`.

    Returns:
        The test set. Its name is the name of the file. ``_replace`` changes frames and words.

    Raises:
        AnnotationError: the file can't be read.
        VideoNotFoundError: the folder ``videos`` does not exist.
    """
    captions = read_captions(annotations)
    names = list(captions)
    paths = names if videos is None else locate_captioned(names, videos)
    name = os.path.splitext(os.path.basename(os.fspath(annotations)))[0]
    return RetrievalSet(name, paths, list(captions.values()), words=None)


def published_videos(name: str) -> int:
    """Return the number of videos of the test set of a retrieval protocol.

    The number is near the number of other copies for ``didemo`` and ``activitynet``, whose videos
    disappear over time.

    Args:
        name: one of :data:`PROTOCOLS`.

    Raises:
        ProtocolError: ``name`` is not known.
    """
    return _protocol(name).videos


def _require_complete(
    name: str, protocol: _Protocol, captions: Captions, allow_incomplete: bool
) -> None:
    count, texts = len(captions), sum(map(len, captions.values()))
    if protocol.exact and (
        count > protocol.videos or (count < protocol.videos and not allow_incomplete)
    ):
        hint = "--allow-incomplete or allow_incomplete=True accepts fewer videos."
        raise wrong_count(name, count, protocol.videos, protocol.videos, hint)
    if texts > count and not protocol.several:
        raise ProtocolError(
            f"{name}: the annotations hold {texts} captions of {count} videos; expected one "
            "caption for each video. Give the file of this test set, not the captions of the "
            "whole data set."
        )


def _protocol(name: str) -> _Protocol:
    if name not in _PROTOCOLS:
        raise ProtocolError(
            f"retrieval protocol {name!r} is not known: choose one of "
            f"{', '.join(map(repr, PROTOCOLS))}{did_you_mean(name, PROTOCOLS)}."
        )
    return _PROTOCOLS[name]
