"""The options that say which videos are evaluated, and on which classes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from openvclip.errors import UsageError
from openvclip.video.protocols import PROTOCOLS

if TYPE_CHECKING:
    from openvclip.video.protocols import Split


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """A protocol of a data set, or a list of the user's own."""
    group = parser.add_argument_group("videos")
    group.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"{', '.join(PROTOCOLS)}; several of one data set take one pass over its videos",
    )
    group.add_argument(
        "--annotations",
        type=Path,
        required=True,
        help="the folder of the official annotation files; without --protocol a list of videos",
    )
    group.add_argument("--videos", type=Path, required=True, help="the folder of the videos")
    group.add_argument(
        "--classes", type=Path, metavar="FILE", help="a class name on each line, for your own list"
    )
    group.add_argument(
        "--allow-incomplete",
        action="store_true",
        help="take annotations of fewer videos than the protocol has",
    )
    group.add_argument(
        "--allow-missing-videos",
        action="store_true",
        help="begin although videos are missing; they are taken as broken",
    )
    group.add_argument(
        "--leave-out-broken",
        action="store_true",
        help="do not count videos that can't be read; otherwise they are wrong",
    )


def splits_of(options: argparse.Namespace) -> list[Split]:
    """The splits that the options name; unless that is allowed, all of their videos are there.

    Raises:
        UsageError: options contradict each other, or the class names are missing.
        AnnotationError, ClassNamesError, ProtocolError: a list or the class names don't fit.
        VideoNotFoundError: videos are missing.
    """
    from openvclip.evaluation import require_videos

    _require_consistent(options)
    splits = _read(options)
    if not options.allow_missing_videos:
        paths = dict.fromkeys(path for split in splits for path, _ in split.samples)
        require_videos(list(paths), str(options.videos))
    return splits


def _require_consistent(options: argparse.Namespace) -> None:
    if options.protocol and options.classes:
        raise UsageError("--classes is for a list of your own; a protocol has its class names.")
    if len({name.partition("-")[0] for name in options.protocol}) > 1:
        raise UsageError(
            f"--protocol {' '.join(options.protocol)}: expected protocols of one data set; give "
            "each data set a command of its own."
        )


def _read(options: argparse.Namespace) -> list[Split]:
    from openvclip.models.labels import read_labels
    from openvclip.video import protocols, read_annotations

    if options.protocol:
        return [
            split
            for name in dict.fromkeys(options.protocol)
            for split in protocols.load(
                name,
                annotations=options.annotations,
                videos=options.videos,
                allow_incomplete=options.allow_incomplete,
            )
        ]
    names = read_labels(options.classes) if options.classes else None
    found = read_annotations(options.annotations, names, root=options.videos)
    if found.class_names is None:
        raise UsageError(
            f"{options.annotations} numbers its classes: give their names with --classes FILE."
        )
    return [protocols.Split(options.annotations.stem, found.class_names, found.samples)]
