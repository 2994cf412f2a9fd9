"""The subcommand ``openvclip search``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvclip.cli.options.library import add_library_model_options, open_index
from openvclip.cli.options.types import Commands
from openvclip.commands.parsing import refuse_unused
from openvclip.errors import UsageError, VideoNotFoundError, near_path

if TYPE_CHECKING:
    from openvclip.search import Index, Moment
    from openvclip.search.searching import SearchResult

_DESCRIPTION = """\
Find the moments of an index that fit a sentence, an image or a clip.

INDEX is a folder that 'openvclip index' made. A result is a moment: a part of
a video, with its start, its end and its score. The score is the cosine
similarity of the query and a window of a few seconds, from -1 to 1.

If the model of the index is calibrated, a sentence finds no moments whose
score is below the threshold of the model. --min-score sets another threshold,
and --min-score -1 sets none.
"""
_USAGE = """\
openvclip search INDEX SENTENCE [SENTENCE ...] [options]
       openvclip search INDEX --image FILE | --clip FILE [options]
       openvclip search INDEX --export FILE
"""
_EXAMPLES = """\
examples:
  openvclip search library.ovx "a person riding a horse" -k 5
  openvclip search library.ovx "a dog" --not "a dog on a beach" --min-score 0.25
  openvclip search library.ovx --image photo.jpg --json
  openvclip search library.ovx --clip match.mp4 --from 62 --to 66 --cut clips/
  openvclip search library.ovx "a goal" "a foul" --html page.html
  openvclip search library.ovx --export vectors.parquet
"""
_K = 10


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "search",
        help="find the moments of indexed videos that fit a sentence",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        usage=_USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "index", metavar="INDEX", type=Path, help="folder that 'openvclip index' made"
    )
    parser.add_argument(
        "sentences", metavar="SENTENCE", nargs="*", help="what the moments show; each is a query"
    )
    _add_query_options(parser)
    _add_output_options(parser)
    add_library_model_options(parser)
    parser.set_defaults(run=_search)


def _add_query_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("query")
    group.add_argument(
        "--image",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="search by an image; may be given several times",
    )
    group.add_argument(
        "--clip",
        metavar="FILE",
        action="append",
        default=[],
        help="search by a video: a file, a URL or a path that a search printed; may be given "
        "several times",
    )
    group.add_argument(
        "--from",
        metavar="SECONDS",
        type=float,
        help="where the part of --clip begins (default: the start of the video)",
    )
    group.add_argument(
        "--to",
        metavar="SECONDS",
        type=float,
        help="where the part of --clip ends (default: the end of the video)",
    )
    group.add_argument(
        "--not",
        dest="negative",
        metavar="SENTENCE",
        action="append",
        default=[],
        help="leave out windows that fit this sentence at least as well as the query; may be given "
        "several times",
    )
    group.add_argument(
        "-k",
        metavar="N",
        type=int,
        default=_K,
        help="largest number of moments for each query (default: %(default)s)",
    )
    group.add_argument(
        "--min-score",
        metavar="SCORE",
        type=float,
        help="lowest score of a moment, from -1 to 1 (default: for sentences the threshold of a "
        "calibrated model, otherwise none)",
    )


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON (default: a table)")
    form.add_argument("--csv", action="store_true", help="print CSV (default: a table)")
    group.add_argument(
        "--cut",
        metavar="FOLDER",
        type=Path,
        help="write each moment to an MP4 file in this folder, with its sound",
    )
    group.add_argument(
        "--html",
        metavar="FILE",
        type=Path,
        help="write a page with a picture and a short video of each moment",
    )
    group.add_argument(
        "--export",
        metavar="FILE",
        type=Path,
        help="write the vectors of all windows to a file, .npy, .npz or .parquet, and search "
        "nothing",
    )


def _search(options: argparse.Namespace) -> int:
    if options.export is not None:
        return _export(options)
    queries = _queries(options)
    index = open_index(options.index, options)
    from openvclip.search.searching import search_index

    results = search_index(
        index, queries, options.k, negative=options.negative, min_score=options.min_score
    )
    _print(results, options)
    return _write_files(index, results, options)


def _queries(options: argparse.Namespace) -> list[Any]:
    """Return the queries, before the model is loaded.

    Raises:
        UsageError: there are none, or the options contradict each other.
        VideoNotFoundError: a file does not exist.
    """
    from openvclip.search import Clip
    from openvclip.search.storage import is_index
    from openvclip.video.sources import is_url

    if not options.clip:
        refuse_unused(options.given, dict.fromkeys(("from", "to"), "without --clip"))
    for sentence in options.sentences:
        if is_index(sentence):
            raise UsageError(
                f"{sentence} is an index, and a query is a sentence. The index comes first: "
                f"openvclip search {sentence} SENTENCE. Each search has one index."
            )
        if os.path.isfile(sentence):
            raise UsageError(
                f"{sentence} is a file, and a query is a sentence. To search by a file, give "
                f"--image {sentence} or --clip {sentence}."
            )
    files: list[Any] = [path if is_url(path) else Path(path) for path in options.clip]
    for path in (*options.image, *files):
        if isinstance(path, Path) and not path.exists():
            raise VideoNotFoundError(f"{path}: no such file{near_path(path)}.")
    part = getattr(options, "from"), options.to
    clips = [Clip(path, *part) for path in files]
    queries = [*options.sentences, *options.image, *clips]
    if not queries:
        raise UsageError(
            "There is nothing to search for: give a sentence, --image FILE or --clip FILE."
        )
    return queries


def _print(results: list[SearchResult], options: argparse.Namespace) -> None:
    from openvclip.search.results import results_as_csv, results_as_json, results_as_text

    if options.json:
        print(json.dumps(results_as_json(results), indent=1))
    elif options.csv:
        print(results_as_csv(results), end="")
    else:
        print(results_as_text(results), flush=True)
        return
    for result in results:
        if not result.moments:
            print(f"{result.query}: {result.reason()}", file=sys.stderr)


def _write_files(index: Index, results: list[SearchResult], options: argparse.Namespace) -> int:
    """Write the page and the clips; return the exit status."""
    failed: dict[str, str] = {}
    if options.html is not None:
        from openvclip.search.page import write_page

        pairs = [(result.query, result.moments) for result in results]
        report = write_page(options.html, pairs, about={"index": str(index.path)})
        failed |= report.failed
        print(f"wrote {report.path}", file=sys.stderr)
    if options.cut is not None:
        from openvclip.search.writing import cut_moments

        # A moment of several queries is cut once.
        moments: list[Moment] = list(dict.fromkeys(m for r in results for m in r.moments))
        cut = cut_moments(moments, options.cut)
        failed |= {moment.path: reason for moment, reason in cut.failed.items()}
        print(f"wrote {len(cut.files)} clips to {options.cut}", file=sys.stderr)
    for reason in failed.values():
        print(reason, file=sys.stderr)
    return int(bool(failed))


def _export(options: argparse.Namespace) -> int:
    from openvclip.search import Index
    from openvclip.search.exporting import export_vectors

    if options.sentences:
        raise UsageError(
            "--export searches nothing, but a sentence is given. Leave the sentence out, or search "
            "without --export."
        )
    given = {"not" if name == "negative" else name for name in options.given}
    names = given - {"command", "index", "sentences", "export", "run"}
    refuse_unused(given, dict.fromkeys(sorted(names), "with --export"))
    count = export_vectors(Index.open(options.index), options.export)
    print(f"wrote {count} vectors to {options.export}")
    return 0
