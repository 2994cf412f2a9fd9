"""The subcommand ``openvclip inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path

from openvclip.cli.options.types import Commands

_DESCRIPTION = """\
Show the content of a file of weights: family, backbone, sizes, activation and
entries, and the contract of the model: the settings that the model was trained
with. The activation is shown only if the file shows it.

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
        help="safetensors, PyTorch or TorchScript file, the index of a sharded model, or the "
        "folder of a model",
    )
    parser.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    from openvclip.checkpoints.api import inspect_checkpoint

    file: Path = options.file
    if file.is_dir():
        from openvclip.checkpoints.contract_files import read_contract
        from openvclip.models.folders import weights_of

        file = weights_of(file, read_contract(file))
    print(inspect_checkpoint(file))
