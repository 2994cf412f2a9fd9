"""``openvclip average``."""

from __future__ import annotations

import argparse
from pathlib import Path

from openvclip.cli.options.outputs import add_output_options, options_of, require_free
from openvclip.cli.options.types import Commands

_AVERAGE = """\
Write the uniform mean of files of weights, such as the checkpoints of a run.

Safetensors files are streamed, not loaded: dozens of models of any size take
less than 100 MB. PyTorch files (.pth) take up to their size. Sums are in
float64; integers come from the last file.
"""
_EXAMPLES = """\
examples:
  openvclip average ckpt-*.safetensors -o swa.safetensors
"""


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "average",
        help="average files of weights",
        description=_AVERAGE,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="files to average")
    add_output_options(parser)
    parser.set_defaults(run=_average)


def _average(options: argparse.Namespace) -> None:
    from openvclip.checkpoints.streaming import average_files

    require_free([options.output], overwrite=options.overwrite)
    average_files(options.files, options.output, **options_of(options))
    print(f"{'wrote':<12} {options.output} (mean of {len(options.files)} files)")
