"""The subcommand ``openvclip convert``."""

from __future__ import annotations

import argparse
from pathlib import Path

from openvclip.cli.options.outputs import (
    add_output_options,
    add_override_option,
    dtype_option,
    require_free,
)
from openvclip.cli.options.types import Commands, add_allow_options
from openvclip.errors import CheckpointError

_DESCRIPTION = """\
Convert a file of weights to safetensors under open_clip's names.

These families are recognised from the content of the file: OpenAI's TorchScript
archives and state dicts, open_clip's checkpoints, Hugging Face's CLIP, and the
.pth files of Open-VCLIP and FROSTER. The prefix of a module around a CLIP, such
as "model." in a checkpoint of Lightning, is removed. The content of the file is
printed first, as by "openvclip inspect". No pickled code is run.
"""
_EXAMPLES = """\
examples:
  openvclip convert swa_2_22.pth -o open-vclip-b16.safetensors
  openvclip convert froster.pth -o froster.safetensors \\
      --allow-unexpected 'projector_*' --allow-unexpected 'raw_model.*'
  openvclip convert last.ckpt -o student.safetensors \\
      --allow-unexpected 'teacher.*'
"""


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint to safetensors under open_clip's names",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        type=Path,
        help="safetensors, PyTorch or TorchScript file, or the index of a sharded model",
    )
    add_output_options(parser, "file to write: *.safetensors")
    add_allow_options(parser)
    add_override_option(parser, "convert without the contract if it can't be passed on")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    from openvclip.checkpoints.api import convert_checkpoint, inspect_checkpoint

    output: Path = options.output
    if output.suffix != ".safetensors":
        raise CheckpointError(
            f"{output}: the result is a safetensors file. Give a name ending in .safetensors."
        )
    require_free([output], overwrite=options.overwrite)
    print(inspect_checkpoint(options.file), flush=True)
    convert_checkpoint(
        options.file,
        output,
        dtype=dtype_option(options),
        allow_missing=options.allow_missing,
        allow_unexpected=options.allow_unexpected,
        override=options.override,
    )
    print(f"{'wrote':<12} {output} ({output.stat().st_size} bytes)")
