"""The subcommand ``openvclip interpolate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from openvclip.cli.options.outputs import add_merge_output_options, require_free, write_options
from openvclip.cli.options.types import Commands
from openvclip.errors import UsageError

_DESCRIPTION = """\
Write lam * A + (1 - lam) * B for two files of weights.

lam weighs A, the original CLIP: --lam 1 is A, --lam 0 is B, the fine-tuned
model. (WiSE-FT and most merging tools weigh the fine-tuned model instead.)
Safetensors files are not loaded: the command needs less than 100 MB of memory
for models of any size. A PyTorch file (.pth) can take memory of its size.
B may be a folder of peft with a LoRA fine-tune of A. Quantised weights and
other adapters are refused.
"""
_EXAMPLES = """\
examples:
  openvclip interpolate clip.safetensors tuned.safetensors \\
      --lam 0.5 -o open-vclip.safetensors
  openvclip interpolate clip.safetensors tuned.safetensors \\
      --lam 0.2 0.4 0.6 -o 'open-vclip-{lam}.safetensors'
"""


def add(commands: Commands) -> None:
    """Add the parser of the subcommand."""
    parser = commands.add_parser(
        "interpolate",
        help="interpolate between the original CLIP and a fine-tuned model",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, meaning in (("a", "the original CLIP"), ("b", "the fine-tuned model")):
        parser.add_argument(
            name,
            metavar=name.upper(),
            type=Path,
            help=f"{meaning}: safetensors or PyTorch file, or the index of a sharded model",
        )
    parser.add_argument(
        "--lam",
        type=float,
        nargs="+",
        required=True,
        help="interpolation weight of A, from 0 to 1; with several values, several files are "
        "written in one pass, and {lam} in the name OUT is replaced by each value",
    )
    parser.add_argument(
        "--visual-only",
        action="store_true",
        help="interpolate the image tower only and take all other entries from A "
        "(default: interpolate all entries)",
    )
    add_merge_output_options(parser)
    parser.set_defaults(run=_interpolate)


def _interpolate(options: argparse.Namespace) -> None:
    from openvclip.checkpoints.streaming import interpolate_files
    from openvclip.weights.lambdas import visual_only

    outs = _output_paths(options.output, options.lam)
    require_free(outs, overwrite=options.overwrite)
    lams = [visual_only(lam) if options.visual_only else lam for lam in options.lam]
    interpolate_files(options.a, options.b, outs, lams, **write_options(options))
    for out in outs:
        print(f"{'wrote':<12} {out}")


def _output_paths(output: Path, lams: list[float]) -> list[Path]:
    if len(lams) > 1 and "{lam}" not in output.name:
        raise UsageError(
            f"{output}: {len(lams)} values of --lam need {len(lams)} files; put {{lam}} into the "
            "name, for example 'out-{lam}.safetensors'."
        )
    return [output.with_name(output.name.replace("{lam}", f"{lam:.12g}")) for lam in lams]
