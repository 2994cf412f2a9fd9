"""Options for the videos and classes to evaluate on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openvclip.commands.parsing import refuse_unused
from openvclip.errors import UsageError
from openvclip.video.protocols import PROTOCOLS

if TYPE_CHECKING:
    from openvclip.video.protocols import Split


def add_data_options(parser: argparse.ArgumentParser, *, retrieval: Sequence[str] = ()) -> None:
    """Add the options for the videos and classes: published protocols, or a list of videos.

    Args:
        parser: the parser.
        retrieval: the retrieval protocols that the command knows.
    """
    also = ""
    if retrieval:
        also = f"; or a protocol of text-to-video retrieval: {', '.join(retrieval)}"
    group = parser.add_argument_group("videos")
    group.add_argument(
        "--protocol",
        choices=(*PROTOCOLS, *retrieval),
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"published protocols of one data set: {', '.join(PROTOCOLS)}; each video is encoded "
        f"once for all of them{also} (default: evaluate on the list of --annotations)",
    )
    group.add_argument(
        "--annotations",
        type=Path,
        metavar="PATH",
        required=True,
        help="with --protocol, the folder of the official annotation files; without --protocol, a "
        "file with a line 'path,class' for each video",
    )
    group.add_argument(
        "--videos", type=Path, metavar="FOLDER", required=True, help="folder of the videos"
    )
    group.add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="file with one class name on each line, for a list of videos",
    )
    group.add_argument(
        "--allow-incomplete",
        action="store_true",
        help="accept annotation files with fewer videos than the protocol has (default: an error)",
    )
    group.add_argument(
        "--allow-missing-videos",
        action="store_true",
        help="treat missing videos as videos that can't be read (default: an error)",
    )
    group.add_argument(
        "--leave-out-broken",
        action="store_true",
        help="do not count videos that can't be read (default: they count as wrong)",
    )


def splits_of(options: argparse.Namespace) -> list[Split]:
    """Return the splits that the options name.

    All videos of the splits must exist, unless ``--allow-missing-videos`` is given.

    Raises:
        UsageError: options contradict each other, or the class names are missing.
        AnnotationError, ClassNamesError, ProtocolError: the annotation files or the class names are
            not valid.
        VideoNotFoundError: videos are missing.
    """
    from openvclip.evaluation import require_videos

    _require_consistent(options)
    splits = _read_splits(options)
    if not options.allow_missing_videos:
        paths = dict.fromkeys(path for split in splits for path, _ in split.samples)
        require_videos(list(paths), str(options.videos))
    return splits


def _require_consistent(options: argparse.Namespace) -> None:
    if options.protocol and options.classes:
        raise UsageError(
            "--classes can't be combined with --protocol: a protocol has its own class names."
        )
    own = "" if options.protocol else "without --protocol: a list of your own is complete"
    refuse_unused(options.given, {"allow_incomplete": own})
    if len({name.partition("-")[0] for name in options.protocol}) > 1:
        raise UsageError(
            f"--protocol {' '.join(options.protocol)}: expected protocols of one data set. Run one "
            "command for each data set."
        )


def _read_splits(options: argparse.Namespace) -> list[Split]:
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
    annotations = read_annotations(options.annotations, names, root=options.videos)
    if annotations.class_names is None:
        raise UsageError(
            f"{options.annotations} holds class indices without class names; give the class names "
            "with --classes FILE."
        )
    return [protocols.Split(options.annotations.stem, annotations.class_names, annotations.samples)]
