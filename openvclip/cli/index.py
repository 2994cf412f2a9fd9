"""The subcommand ``openvclip index``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from openvclip.cli.options.library import (
    add_library_model_options,
    load_video_clip,
    open_index_and_source,
)
from openvclip.cli.options.shards import add_shard_options, index_or_merge, is_sharded
from openvclip.cli.options.types import Commands
from openvclip.commands.parsing import refuse_unused
from openvclip.errors import UsageError

if TYPE_CHECKING:
    from openvclip.search import Index, Report

_DESCRIPTION = """\
Make an index of videos, add videos to it, or bring it up to date. Afterwards
'openvclip search' finds the moments that a sentence describes.

VIDEO is a file, a folder with its subfolders, a pattern such as
'clips/**/*.mp4', or a URL. The index is a folder. It holds a vector for each
window of a few seconds, and the settings of the model. Each video is decoded
once. A video that the index has is skipped, unless its file changed.

The videos that are done are on the disk after every few seconds. After Ctrl-C
or a kill, run the same command again: it continues with the videos that are
left.

Files that can't be read are listed at the end. The exit status is then 1.
"""
_USAGE = """\
openvclip index VIDEO [VIDEO ...] -o INDEX [--update] [options]
       openvclip index INDEX --update [options]
       openvclip index INDEX --remove PATH [PATH ...]
       openvclip index --shards PATTERN [PATTERN ...] -o PARTS [options]
       openvclip index --merge PARTS [PARTS ...] -o INDEX [--shards ...]
"""
_EXAMPLES = """\
examples:
  openvclip index videos/ -o library.ovx --model runs/b16
  openvclip index more/ 'clips/**/*.mp4' -o library.ovx
  openvclip index videos/ -o library.ovx --seconds 10 --step 5
  openvclip index library.ovx --update
  openvclip index library.ovx --remove videos/old
  torchrun --nproc-per-node 8 -m openvclip index --model runs/b16 \\
      --shards 's3://bucket/{0000..0999}.tar' -o s3://bucket/parts
  openvclip index --merge s3://bucket/parts -o library.ovx
"""
_BATCH = 16


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "index",
        help="make an index of videos, to search them by a sentence",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        usage=_USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "videos",
        metavar="VIDEO",
        nargs="*",
        help="a file, folder, pattern or URL; or an index, with --update or --remove",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="INDEX",
        help="folder of the index, such as library.ovx; videos are added to an index that exists",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help="bring all videos of the index up to date: encode files that changed again, and "
        "remove videos whose files are gone (default: only the files of VIDEO are compared)",
    )
    parser.add_argument(
        "--remove",
        metavar="PATH",
        nargs="+",
        help="remove videos from the index: files, folders or patterns; the files stay",
    )
    add_shard_options(parser)
    windows = parser.add_argument_group("windows")
    windows.add_argument(
        "--seconds",
        type=float,
        help="length of a window (default: the length of a clip, frames x sampling rate / 30)",
    )
    windows.add_argument(
        "--step",
        type=float,
        metavar="SECONDS",
        help="time from the start of a window to the start of the next window (default: half the "
        "length of a window)",
    )
    windows.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=_BATCH,
        help="windows to encode at a time (default: %(default)s)",
    )
    windows.add_argument(
        "--num-threads",
        metavar="N",
        type=int,
        help="threads that decode videos (default: the number of cores, at most 8)",
    )
    add_library_model_options(parser, new=True)
    parser.set_defaults(run=_index)


def _index(options: argparse.Namespace) -> int:
    if is_sharded(options):
        return index_or_merge(options)
    path, videos = _index_and_videos(options)
    if options.remove is not None:
        return _remove(path, options)
    index = _opened(path, videos, options)
    if index is None:
        return 1
    settings = {"batch_size": options.batch_size, "num_threads": options.num_threads}
    reports = []
    if options.update:
        reports.append(index.update(**settings))
    if videos:
        reports.append(index.add(videos, **settings))
    return _print(index, reports)


def _index_and_videos(options: argparse.Namespace) -> tuple[Path, list[str]]:
    """Return the folder of the index, and the videos to add."""
    videos: list[str] = options.videos
    if not videos and (options.output is None or not options.update):
        raise UsageError(
            "Nothing to index is given; expected VIDEO, --shards PATTERN or --merge PARTS."
        )
    if options.output is not None:
        if options.remove is not None:
            raise UsageError(
                "--remove with --output: to remove videos, give the index alone: openvclip index "
                f"{options.output} --remove PATH."
            )
        return Path(options.output), videos
    if not options.update and options.remove is None:
        from openvclip.search.storage import is_index

        if is_index(videos[0]):
            raise UsageError(
                f"{videos[0]} is an index. To bring it up to date, add --update; to add videos to "
                f"it: openvclip index VIDEO --output {videos[0]}."
            )
        raise UsageError("Give the folder of the index: --output library.ovx.")
    if len(videos) > 1:
        raise UsageError(
            f"{len(videos)} paths without --output; expected the index alone. To add videos, give "
            "the folder of the index with --output."
        )
    return Path(videos[0]), []


def _opened(path: Path, videos: list[str], options: argparse.Namespace) -> Index | None:
    """Return the index, a new one if there is none; ``None`` if there is nothing to put in."""
    from openvclip.search import Index, WindowOptions
    from openvclip.search.identity import require_same_windows
    from openvclip.search.inputs import named_videos
    from openvclip.search.storage import is_index, require_free

    windows = WindowOptions(options.seconds, options.step)
    if is_index(path) or not videos:
        index, source = open_index_and_source(path, options)
        require_same_windows(index.path, index.window_settings, windows)
        if source is not None:  # the model may have been moved
            index.set_source(source)
        return index
    found, failed = named_videos(videos)
    if not found:  # before the model is loaded
        _print_failures(failed)
        print(f"There is nothing to index; {path} was not made.", file=sys.stderr)
        return None
    require_free(path)
    model, source = load_video_clip(options)
    if is_index(path):  # another process made it while the model was loaded
        index = Index.open(path, model)
        require_same_windows(index.path, index.window_settings, windows)
        return index
    return Index.create(path, model, windows=windows, source=source)


def _remove(path: Path, options: argparse.Namespace) -> int:
    from openvclip.search import Index

    names = set(options.given) - {"command", "videos", "remove", "run"}
    refuse_unused(options.given, dict.fromkeys(sorted(names), "with --remove"))
    index = Index.open(path)
    removed = index.remove(options.remove)
    print(f"{path}: {len(removed)} removed. {_content(index)}")
    return 0


def _print(index: Index, reports: list[Report]) -> int:
    failed: dict[str, str] = {}
    for report in reports:
        failed |= report.failed | report.damaged
    _print_failures(failed)
    texts = [str(report) for report in reports]
    print(f"{index.path}: {'; '.join(texts)}. {_content(index)}")
    return int(bool(failed))


def _print_failures(failed: dict[str, str]) -> None:
    for reason in failed.values():
        print(reason, file=sys.stderr)


def _content(index: Index) -> str:
    return f"The index has {len(index.videos)} videos, {len(index)} windows."
