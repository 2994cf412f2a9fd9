"""``openvclip inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path

from openvclip.cli.options.types import Commands


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    text = "Tell what a file of weights holds, from its content and without loading it."
    parser = commands.add_parser("inspect", help="tell what a file holds", description=text)
    parser.add_argument("file", metavar="FILE", type=Path, help="a file of weights")
    parser.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    from openvclip.checkpoints.api import inspect_checkpoint

    print(inspect_checkpoint(options.file))
