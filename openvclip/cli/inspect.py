"""The subcommand ``openvclip inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path

from openvclip.cli.options.types import Commands

_DESCRIPTION = """\
Show the content of a file of weights: family, backbone, sizes, activation and
entries. The activation is shown only if the file shows it.

The weights are not loaded. No pickled code is run.
"""


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "inspect",
        help="show the content of a file of weights",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="safetensors, PyTorch or TorchScript file, or the index of a sharded model",
    )
    parser.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    from openvclip.checkpoints.api import inspect_checkpoint

    print(inspect_checkpoint(options.file))
