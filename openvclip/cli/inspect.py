"""The subcommand ``openvclip inspect``."""

from __future__ import annotations

import argparse
from pathlib import Path

from openvclip.cli.options.types import Commands

_DESCRIPTION = """\
Show the content of a file of weights: family, backbone, sizes, activation and
entries, and the contract of the model: the settings that the model was trained
with. The activation is shown only if the file shows it. Of an exported model
(.onnx or .pt2), the part, the labels and the contract are shown. Of a folder,
the file that openvclip loads is shown.

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
        help="safetensors, PyTorch or TorchScript file, the index of a sharded model, an "
        "exported model, or the folder of a model",
    )
    parser.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    from openvclip.checkpoints.api import inspect_checkpoint
    from openvclip.checkpoints.exported_files import is_exported

    file: Path = options.file
    if is_exported(file):
        from openvclip.models.exported_report import export_report

        print(export_report(file))
    elif file.is_dir():
        print(_folder_report(file))
    else:
        print(inspect_checkpoint(file))


def _folder_report(folder: Path) -> str:
    from openvclip.checkpoints.api import inspect_checkpoint
    from openvclip.checkpoints.contract_files import read_contract
    from openvclip.checkpoints.contract_report import rows_text
    from openvclip.models.folders import weights_of

    contract = read_contract(folder)
    info = inspect_checkpoint(weights_of(folder, contract))
    # The contract of the folder is not shown with the file if it does not name the file.
    beside = "" if contract is None or info.contract is not None else f"\n{rows_text(contract)}"
    return f"{info}{beside}"
