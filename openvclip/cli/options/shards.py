"""Options to index tar shards with many processes, and to merge the parts that they write."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from openvclip.cli.options.library import load_video_clip
from openvclip.commands.parsing import refuse_unused
from openvclip.errors import UsageError

if TYPE_CHECKING:
    from openvclip.search import MergeReport, ShardReport


def add_shard_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--shards`` and ``--merge``."""
    group = parser.add_argument_group("many machines")
    group.add_argument(
        "--shards",
        metavar="PATTERN",
        nargs="+",
        help="index the videos in tar files, such as 's3://bucket/{0000..0999}.tar': write one "
        "part for each tar file into the folder of --output, also under torchrun and srun, where "
        "each process takes its share; finished parts are skipped",
    )
    group.add_argument(
        "--merge",
        metavar="PARTS",
        nargs="+",
        help="make an index of the parts in these folders, or add them to an index; with --shards, "
        "the tar files without a part are listed",
    )


def is_sharded(options: argparse.Namespace) -> bool:
    """Return whether the command line names shards or parts.

    Raises:
        UsageError: it names something else too, or no folder to write.
    """
    if options.shards is None and options.merge is None:
        return False
    name = "--shards" if options.merge is None else "--merge"
    for other, given in (
        ("videos", options.videos),
        ("--update", options.update),
        ("--remove", options.remove is not None),
    ):
        if given:
            raise UsageError(f"{name} and {other} can't be combined. Run the command twice.")
    if options.output is None:
        folder = "the parts: --output PARTS" if name == "--shards" else "the index: --output INDEX"
        raise UsageError(f"Give the folder of {folder}.")
    return True


def index_or_merge(options: argparse.Namespace) -> int:
    """Index shards, or merge parts. Return the exit status.

    Raises:
        UsageError: an option has no effect.
        SearchError: parts of different models are mixed, or a folder can't be read or written.
    """
    return _index(options) if options.merge is None else _merge(options)


def _index(options: argparse.Namespace) -> int:
    from openvclip.processes import started_processes
    from openvclip.search import WindowOptions, index_shards
    from openvclip.video.shards import shards_of

    processes = started_processes()
    shards_of(options.shards)  # a wrong pattern is reported before the model is loaded
    windows = WindowOptions(options.seconds, options.step)
    model, source = load_video_clip(options)
    reports = index_shards(
        options.shards,
        options.output,
        model,
        windows=windows,
        source=source,
        batch_size=options.batch_size,
        num_threads=options.num_threads,
        processes=processes,
        tell=_tell,
    )
    broken = [report for report in reports if report.error is not None]
    failed = sum(len(report.failed) + len(report.damaged) for report in reports)
    skipped = sum(report.skipped for report in reports)
    who = (
        f"process {processes.rank} of {processes.world_size}: " if processes.world_size > 1 else ""
    )
    print(
        f"{who}{options.output}: {len(reports)} shards ({skipped} finished before), "
        f"{sum(report.videos for report in reports)} videos, "
        f"{sum(report.windows for report in reports)} windows; {failed} videos failed or damaged, "
        f"{len(broken)} shards not read to their end.",
        flush=True,
    )
    # The error of one process would end the other processes.
    return int(processes.world_size == 1 and bool(broken or failed))


def _tell(report: ShardReport) -> None:
    print(report, flush=True)
    if not report.skipped:
        for reason in [*report.failed.values(), *report.damaged.values()]:
            print(reason, file=sys.stderr, flush=True)


def _merge(options: argparse.Namespace) -> int:
    from openvclip.search import Index, merge_parts

    reason = "with --merge: the parts have a model and windows"
    names = set(options.given) - {"command", "videos", "merge", "shards", "output", "run"}
    refuse_unused(options.given, dict.fromkeys(sorted(names), reason))
    report = merge_parts(options.merge, Path(options.output), shards=options.shards)
    for lines in (report.failed, report.damaged, report.incomplete):
        for line in lines.values():
            print(line, file=sys.stderr)
    for shard in report.missing:
        print(f"{shard}: has no part.", file=sys.stderr)
    index = Index.open(options.output)
    print(
        f"{index.path}: {report.parts} parts; {_counts(report)}. "
        f"The index has {len(index.videos)} videos, {len(index)} windows."
    )
    return int(bool(report.failed or report.damaged or report.incomplete or report.missing))


def _counts(report: MergeReport) -> str:
    counts = {
        "videos added": report.added,
        "unchanged": report.unchanged,
        "repeated": len(report.repeated),
        "failed": len(report.failed),
        "damaged": len(report.damaged),
        "shards not read to their end": len(report.incomplete),
        "shards without a part": len(report.missing),
    }
    shown = {name: count for name, count in counts.items() if count or name == "videos added"}
    return ", ".join(f"{count} {name}" for name, count in shown.items())
