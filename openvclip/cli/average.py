"""The subcommand ``openvclip average``."""

from __future__ import annotations

import argparse
from pathlib import Path

from openvclip.cli.options.outputs import add_merge_output_options, require_free, write_options
from openvclip.cli.options.types import Commands

_DESCRIPTION = """\
Write the uniform mean of files of weights, such as the checkpoints of a run.

Sums are computed in float64. Integers come from the last file. Safetensors
files are not loaded: the command needs less than 100 MB of memory for dozens of
models of any size. A PyTorch file (.pth) can take memory of its size.
Quantised weights and factors of adapters (LoRA) are refused.
"""
_EXAMPLES = """\
examples:
  openvclip average ckpt-*.safetensors -o swa.safetensors
"""


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "average",
        help="write the mean of files of weights",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files",
        metavar="FILE",
        type=Path,
        nargs="+",
        help="safetensors or PyTorch file, or the index of a sharded model; all files must have "
        "the same names and shapes",
    )
    add_merge_output_options(parser)
    parser.set_defaults(run=_average)


def _average(options: argparse.Namespace) -> None:
    from openvclip.checkpoints.streaming import average_files

    require_free([options.output], overwrite=options.overwrite)
    average_files(options.files, options.output, **write_options(options))
    print(f"{'wrote':<12} {options.output} (mean of {len(options.files)} files)")
