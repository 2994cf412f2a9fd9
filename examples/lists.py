r"""Write the annotation lists of a setting: the videos for training and the videos for testing.

    python lists.py base-to-novel hmdb51 --annotations testTrainMulti_7030_splits \
        --videos hmdb51 --seed 1 --out lists/        # train.csv, base.csv, novel.csv
    python lists.py few-shot ucf101 --shots 8 ... --out lists/  # train.csv, test.csv
    python lists.py protocol ucf101-ep3 ... --out lists/        # ucf101-ep3-1.csv, ...

``--shots all`` takes all training videos, for supervised training on UCF-101 and HMDB-51. A list
has a line ``path,class name`` for each video. ``finetune.py``, ``accuracy.py`` and
``openvclip evaluate`` read such a list with ``--annotations`` and without ``--classes``.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

from openvclip.checkpoints import atomic_path
from openvclip.commands.parsing import Parser, unused_option
from openvclip.commands.streams import command
from openvclip.errors import OpenVCLIPError
from openvclip.video import protocols
from openvclip.video.protocols import Split

SETTINGS = ("base-to-novel", "few-shot", "protocol")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(
        prog="lists.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("setting", choices=SETTINGS)
    known = ", ".join(protocols.PROTOCOLS)
    parser.add_argument("name", help=f"ucf101 or hmdb51; after 'protocol': one of {known}")
    parser.add_argument(
        "--annotations", type=Path, required=True, help="folder of the official lists"
    )
    parser.add_argument(
        "--videos",
        type=Path,
        help="folder of the videos; needed if their paths differ from the official lists",
    )
    parser.add_argument(
        "--shots",
        type=_shots,
        default=16,
        metavar="N|all",
        help="training videos of each class; not for a protocol (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        help="seed that draws the training videos (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the lists to")
    args = parser.parse_args(arguments)
    drawn = "for a protocol, whose videos are not drawn" if args.setting == "protocol" else ""
    problem = unused_option(args.given, {"shots": drawn, "seed": drawn})
    if problem:
        parser.error(problem)
    return args


def _shots(text: str) -> int | None:
    return None if text == "all" else int(text)


def splits_of(args: argparse.Namespace) -> dict[str, Split]:
    """Return the splits of a setting by name.

    Raises:
        ProtocolError, AnnotationError, VideoNotFoundError: see :mod:`openvclip.video.protocols`.
    """
    folders = {"annotations": args.annotations, "videos": args.videos}
    if args.setting == "protocol":
        return {split.name: split for split in protocols.load(args.name, **folders)}
    draw = {"shots": args.shots, "seed": args.seed}
    if args.setting == "few-shot":
        return protocols.few_shot(args.name, **folders, **draw)._asdict()
    return protocols.base_to_novel(args.name, **folders, **draw)._asdict()


def write_list(split: Split, path: Path) -> None:
    """Write a line ``path,class name`` for each video, atomically."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerows((video, split.class_names[index]) for video, index in split.samples)


@command
def main(arguments: list[str] | None = None, tell: Callable[[str], object] = print) -> None:
    """Write the lists."""
    args = parse_arguments(arguments)
    try:
        splits = splits_of(args)
        args.out.mkdir(parents=True, exist_ok=True)
        for name, split in splits.items():
            write_list(split, args.out / f"{name}.csv")
            classes, videos = len(split.class_names), len(split.samples)
            tell(f"{args.out / name}.csv: {videos} videos of {classes} classes")
    except (OpenVCLIPError, OSError) as error:
        print(f"lists.py: error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
