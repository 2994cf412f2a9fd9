"""``openvclip interpolate``."""

from __future__ import annotations

import argparse
from pathlib import Path

from openvclip.cli.options.outputs import add_output_options, options_of, require_free
from openvclip.cli.options.types import Commands
from openvclip.errors import UsageError

_INTERPOLATE = """\
Write lam * A + (1 - lam) * B for two files of weights.

lam weighs A, the original CLIP: --lam 1 is A, --lam 0 is B, the fine-tuned
model. (WiSE-FT and most merging tools weigh the fine-tuned model instead.)
Safetensors files are streamed, not loaded: a model of any size takes less than
100 MB. PyTorch files (.pth) take up to their size.
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
        help="interpolate two files of weights",
        description=_INTERPOLATE,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", metavar="A", type=Path, help="file of the original CLIP")
    parser.add_argument("b", metavar="B", type=Path, help="file of the fine-tuned model")
    parser.add_argument(
        "--lam",
        type=float,
        nargs="+",
        required=True,
        help="weight of A, from 0 to 1; several write several models in one pass, and {lam} in "
        "the name of the output stands for each",
    )
    parser.add_argument(
        "--visual-only",
        action="store_true",
        help="interpolate the visual tower; everything else is A's",
    )
    add_output_options(parser)
    parser.set_defaults(run=_interpolate)


def _interpolate(options: argparse.Namespace) -> None:
    from openvclip.checkpoints.streaming import interpolate_files
    from openvclip.weights.lambdas import visual_only

    outs = _names(options.output, options.lam)
    require_free(outs, overwrite=options.overwrite)
    lams = [visual_only(lam) if options.visual_only else lam for lam in options.lam]
    interpolate_files(options.a, options.b, outs, lams, **options_of(options))
    for out in outs:
        print(f"{'wrote':<12} {out}")


def _names(output: Path, lams: list[float]) -> list[Path]:
    if len(lams) > 1 and "{lam}" not in output.name:
        raise UsageError(
            f"{output}: {len(lams)} values of --lam need as many files; put {{lam}} into the name, "
            "for example 'out-{lam}.safetensors'."
        )
    return [output.with_name(output.name.replace("{lam}", f"{lam:.12g}")) for lam in lams]
