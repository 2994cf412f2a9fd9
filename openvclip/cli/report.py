"""The subcommand ``openvclip report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from openvclip.cli.options.failures import plural, report_failures
from openvclip.cli.options.outputs import require_free
from openvclip.cli.options.types import Commands
from openvclip.commands.parsing import refuse_unused

_DESCRIPTION = """\
Write a page about evaluations: one HTML file that needs no connection.

RESULTS is a folder that 'openvclip evaluate' wrote, or a folder above several.
A slider sets the interpolation weight. The page shows the accuracy along it,
the accuracy of each class beside that of the original CLIP, the classes that
are confused, and the clips with a wrong answer. Several models are compared.

For the change against CLIP, evaluate the original CLIP on the same videos too
(the same command with --lam 1 --no-expand and another --out), or sweep up to
--lam 1. For a model without --lam, give the results of the original CLIP with
--original.
"""
_EXAMPLES = """\
examples:
  openvclip report openvclip-results/ -o report.html
  openvclip report results/ucf101 results/k400 -o report.html --posters
  openvclip report runs/plain/test runs/iwr/test --names Plain IWR -o compare.html
  openvclip report results/ -o report.html --posters --videos UCF-101/
"""


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "report",
        help="write a page about evaluations",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results", metavar="RESULTS", nargs="+", type=Path, help="folder of results"
    )
    parser.add_argument(
        "-o", "--output", metavar="OUT", type=Path, required=True, help="page to write: *.html"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUT if it exists (default: keep it and end with an error)",
    )
    parser.add_argument(
        "--title", metavar="TEXT", default="", help="title of the page (default: the models)"
    )
    parser.add_argument(
        "--names",
        metavar="NAME",
        nargs="+",
        default=[],
        help="a name for each model, in the order of the results (default: the names of the "
        "models, with the folder if two have the same name)",
    )
    parser.add_argument(
        "--original",
        metavar="FOLDER",
        type=Path,
        help="results of the original CLIP, to compare with (default: the results whose original "
        "weights are the same)",
    )
    clips = parser.add_argument_group("clips with a wrong answer")
    clips.add_argument(
        "--clips",
        metavar="N",
        type=int,
        default=60,
        help="largest number to list for each model, test and weight (default: %(default)s)",
    )
    clips.add_argument(
        "--posters", action="store_true", help="add a picture of each clip (default: none)"
    )
    clips.add_argument(
        "--videos",
        metavar="FOLDER",
        type=Path,
        help="folder of the videos, with --posters (default: the folder that was evaluated)",
    )
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    if not options.posters:
        refuse_unused(options.given, {"videos": "without --posters"})
    require_free([options.output], overwrite=options.overwrite)
    from openvclip.evaluation.report import ReportSettings, write_report

    settings = ReportSettings(
        clips=options.clips,
        posters=options.posters,
        videos=options.videos,
        original=options.original,
    )
    summary = write_report(
        options.output, options.results, title=options.title, names=options.names, settings=settings
    )
    for folder in summary.left_out:
        print(f"left out {folder}: results of retrieval, which have no classes", file=sys.stderr)
    for folder in summary.incomplete:
        print(
            f"{folder} has no answers for each clip. If 'openvclip evaluate' wrote it, run the "
            "same command again to get them; the features are kept.",
            file=sys.stderr,
        )
    if summary.too_large:
        print(f"{plural(summary.too_large, 'picture')} did not fit into the page", file=sys.stderr)
    models, tests = plural(len(summary.models), "model"), plural(len(summary.tests), "test")
    print(f"wrote {summary.path}: {models}, {tests}, {summary.bytes / 1e6:.1f} MB")
    report_failures(list(summary.failed.values()), "shown without a picture")
    return int(bool(summary.failed))
