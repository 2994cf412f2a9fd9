"""``openvclip convert``."""

from __future__ import annotations

import argparse
from pathlib import Path

from openvclip.cli.options.outputs import DTYPES, require_free
from openvclip.cli.options.types import Commands, add_allow_options
from openvclip.errors import CheckpointError

_CONVERT = """\
Write a file of weights as safetensors under open_clip's names.

Known from their content: OpenAI's TorchScript archives and state dicts,
open_clip's checkpoints, Hugging Face's CLIP, Open-VCLIP's and FROSTER's .pth.
What the file holds is printed first. No code that a file names is run.
"""
_CONVERT_EXAMPLES = """\
examples:
  openvclip convert swa_2_22.pth -o open-vclip-b16.safetensors
  openvclip convert froster.pth -o froster.safetensors \\
      --allow-unexpected 'projector_*' --allow-unexpected 'raw_model.*'
"""


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint under open_clip's names",
        description=_CONVERT,
        epilog=_CONVERT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", type=Path, help="a file of weights")
    parser.add_argument(
        "-o", "--output", metavar="OUT.safetensors", type=Path, required=True, help="file to write"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype to store floating-point weights in (as they are)"
    )
    add_allow_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    import torch

    from openvclip.checkpoints.api import convert_checkpoint, inspect_checkpoint

    output: Path = options.output
    if output.suffix != ".safetensors":
        raise CheckpointError(
            f"{output}: the result is a safetensors file; give it a name ending in .safetensors."
        )
    require_free([output], overwrite=options.overwrite)
    print(inspect_checkpoint(options.source), flush=True)
    convert_checkpoint(
        options.source,
        output,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        allow_missing=options.allow_missing,
        allow_unexpected=options.allow_unexpected,
    )
    print(f"{'wrote':<12} {output} ({output.stat().st_size} bytes)")
