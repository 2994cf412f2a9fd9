"""``openvclip check-videos``: find the video files that cannot be read."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from openvclip.cli.options.types import Commands
from openvclip.commands.parsing import refuse_unused
from openvclip.errors import AnnotationError, VideoNotFoundError, VideoOptionError, near_path

if TYPE_CHECKING:
    from openvclip.video import VideoCheck

_CHECK = """\
Find the video files that cannot be read, before a training run or an
evaluation meets them.

All files are decoded in parallel. A file that crashes the decoder is
reported as bad, and the check continues with the next file. The result is a
CSV file with one line for each video: path, status, reason, frames, fps,
width, height, seconds, bytes. The status is ok, damaged (only some frames can
be decoded) or bad (no frame can be decoded). Each line is written as soon as
the video is checked, so Ctrl-C keeps the lines of the checked videos.

The exit status is 1 if a file is bad or damaged.
"""
_CHECK_EXAMPLES = """\
examples:
  openvclip check-videos UCF-101 -o checked.csv
  openvclip check-videos train.csv val.csv --videos /data/kinetics -o checked.csv
  openvclip check-videos ucfTrainTestlist --videos UCF-101 -o checked.csv
"""
_INTERRUPTED = 130  # the exit status of a process that Ctrl-C ended, by the convention of shells


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "check-videos",
        help="find the video files that cannot be read",
        description=_CHECK,
        epilog=_CHECK_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources",
        metavar="PATH",
        type=Path,
        nargs="+",
        help="a video, a folder of videos, an annotation file, or a folder of official lists",
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT.csv", type=Path, required=True, help="CSV file to write"
    )
    parser.add_argument(
        "--videos",
        metavar="DIR",
        type=Path,
        default=Path(),
        help="folder to which the paths in annotation files refer (default: current folder)",
    )
    parser.add_argument(
        "--num-workers",
        metavar="N",
        type=int,
        help="number of worker processes (default: one for each core)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="decode only the first frame of each file"
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=600.0,
        help="a file that takes longer counts as bad (default: %(default)g)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.csv if it exists")
    parser.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    from openvclip.video import check_videos

    output: Path = options.output
    if output.exists() and not options.overwrite:
        raise VideoOptionError(f"{output} exists; give --overwrite to replace it.")
    if not output.parent.is_dir():
        raise VideoOptionError(f"{output}: there is no folder {output.parent}; make it first.")
    videos = {source: _videos(source) for source in options.sources}
    if None not in videos.values():
        reason = "without an annotation file: the paths of videos and folders are complete"
        refuse_unused(options.given, {"videos": reason})
    paths = (
        _listed(source, options.videos) if found is None else found
        for source, found in videos.items()
    )
    files = list(dict.fromkeys(chain.from_iterable(paths)))
    checks = check_videos(
        files, num_workers=options.num_workers, quick=options.quick, timeout=options.timeout
    )
    with _opened(output) as table, closing(checks):
        counts, stopped = _write_checks(checks, table, len(files))
    missed = f", {len(files) - counts.total()} not checked" if stopped else ""
    print(
        f"{counts['ok']} ok, {counts['damaged']} damaged, {counts['bad']} bad{missed}; see {output}"
    )
    return _INTERRUPTED if stopped else int(counts["ok"] < len(files))


def _write_checks(
    checks: Iterable[VideoCheck], table: TextIO, total: int
) -> tuple[Counter[str], bool]:
    """Write the checks; return the number of files by status, and whether Ctrl-C was pressed."""
    import csv

    from openvclip.commands.progress import progress_bar
    from openvclip.video import VideoCheck

    counts: Counter[str] = Counter()
    writer = csv.writer(table)
    writer.writerow(VideoCheck._fields)
    bar = progress_bar(checks, total=total, desc="check-videos", unit=" files", disable=False)
    try:
        for check in bar:
            writer.writerow(check)
            table.flush()
            counts[check.status] += 1
            if check.status != "ok":
                reason = check.reason.encode("utf-8", "backslashreplace").decode()
                bar.write(f"{check.status}: {reason}")
    except KeyboardInterrupt:
        return counts, True
    return counts, False


@contextmanager
def _opened(output: Path) -> Iterator[TextIO]:
    try:
        # File names can contain bytes that are not UTF-8. These bytes are written unchanged.
        with output.open("w", newline="", encoding="utf-8", errors="surrogateescape") as table:
            yield table
    except BrokenPipeError:  # of standard output
        raise
    except OSError as error:
        raise VideoOptionError(
            f"{output}: can't be written ({error.strerror}). Check free space and permissions."
        ) from error


def _videos(source: Path) -> list[str] | None:
    """Return the paths of a video or of the videos in a folder; ``None`` for lists of videos."""
    from openvclip.video.files import VIDEO_SUFFIXES, find_videos

    if not source.exists():
        raise VideoNotFoundError(f"{source}: no such file or folder{near_path(source)}.")
    if not source.is_dir():
        return [os.fspath(source)] if source.suffix.lower() in VIDEO_SUFFIXES else None
    videos = find_videos(source)
    if not videos and not any(source.glob("*.txt")):
        raise AnnotationError(f"{source}: holds neither videos nor lists of them.")
    return [os.path.join(source, path) for path in videos] or None


def _listed(source: Path, root: Path) -> list[str]:
    """Return the paths of the videos that a list, or a folder of lists, names."""
    from openvclip.video.annotations import read_annotations

    return [os.path.join(root, path) for path, _ in read_annotations(source, root=root).samples]
