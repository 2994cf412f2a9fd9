"""``openvclip check-videos``."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from openvclip.cli.options.types import Commands
from openvclip.errors import AnnotationError, VideoNotFoundError, VideoOptionError

_CHECK = """\
Find the video files that can't be read, before a run meets them.

Every file is decoded, in parallel; one that crashes the decoder is found and
the others go on. The result is a CSV with a line for each file: path, status
(ok, damaged: some frames can be decoded, bad: none), reason, frames, fps,
width, height, seconds, bytes. It is written as the files are done, so what
was found before Ctrl-C is there.

The exit status is 1 if a file is bad or damaged.
"""
_CHECK_EXAMPLES = """\
examples:
  openvclip check-videos UCF-101 -o checked.csv
  openvclip check-videos train.csv val.csv --videos /data/kinetics -o checked.csv
  openvclip check-videos ucfTrainTestlist --videos UCF-101 -o checked.csv
"""
_INTERRUPTED = 130  # as shells report a process that Ctrl-C ended


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "check-videos",
        help="find the video files that can't be read",
        description=_CHECK,
        epilog=_CHECK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources",
        metavar="PATH",
        type=Path,
        nargs="+",
        help="a folder of videos, a video, an annotation file, a folder of official lists",
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT.csv", type=Path, required=True, help="file to write"
    )
    parser.add_argument(
        "--videos",
        metavar="DIR",
        type=Path,
        default=Path(),
        help="folder that the paths in annotation files start from (where you are)",
    )
    parser.add_argument(
        "--num-workers", metavar="N", type=int, help="processes (one for each core)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="decode only the first frame of each file"
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=600.0,
        help="a file that takes longer counts as bad (%(default)g)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    parser.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    import csv
    from contextlib import closing

    from tqdm import tqdm  # comes with open_clip

    from openvclip.video import VideoCheck, check_videos

    output: Path = options.output
    if output.exists() and not options.overwrite:
        raise VideoOptionError(f"{output} exists; give --overwrite to replace it.")
    if not output.parent.is_dir():
        raise VideoOptionError(f"{output}: there is no folder {output.parent}; make it first.")
    files = list(
        dict.fromkeys(path for source in options.sources for path in _files(source, options.videos))
    )
    checks = check_videos(
        files, num_workers=options.num_workers, quick=options.quick, timeout=options.timeout
    )
    counts: Counter[str] = Counter()
    stopped = False
    with _written(output) as table, closing(checks):
        writer = csv.writer(table)
        writer.writerow(VideoCheck._fields)
        try:
            for check in tqdm(checks, total=len(files), desc="check-videos", unit=" files"):
                writer.writerow(check)
                table.flush()
                counts[check.status] += 1
                if check.status != "ok":
                    reason = check.reason.encode("utf-8", "backslashreplace").decode()
                    tqdm.write(f"{check.status}: {reason}")
        except KeyboardInterrupt:
            stopped = True
    missed = f", {len(files) - counts.total()} not checked" if stopped else ""
    print(
        f"{counts['ok']} ok, {counts['damaged']} damaged, {counts['bad']} bad{missed}; see {output}"
    )
    return _INTERRUPTED if stopped else int(counts["ok"] < len(files))


@contextmanager
def _written(output: Path) -> Iterator[TextIO]:
    try:
        # Names of files need not be UTF-8; they go through as they are.
        with output.open("w", newline="", encoding="utf-8", errors="surrogateescape") as table:
            yield table
    except OSError as error:
        raise VideoOptionError(
            f"{output}: can't be written ({error.strerror}). Check free space and permissions."
        ) from error


def _files(source: Path, root: Path) -> list[str]:
    from openvclip.video.annotations import read_annotations
    from openvclip.video.files import VIDEO_SUFFIXES, find_videos

    if not source.exists():
        raise VideoNotFoundError(f"{source}: no such file or folder.")
    if source.is_dir():
        found = find_videos(source)
        if found:
            return [os.path.join(source, path) for path in found]
        if not any(source.glob("*.txt")):
            raise AnnotationError(f"{source}: holds neither videos nor lists of them.")
    elif source.suffix.lower() in VIDEO_SUFFIXES:
        return [os.fspath(source)]
    return [os.path.join(root, path) for path, _ in read_annotations(source, root=root).samples]
