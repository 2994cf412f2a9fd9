"""A data set in one option of a script, by words such as ``annotations=FILE``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from openvclip.cli.options.data import add_data_options, splits_of
from openvclip.commands.parsing import Parser
from openvclip.errors import UsageError

if TYPE_CHECKING:
    from openvclip.video.protocols import Split

__all__ = ["chosen_splits", "data_set_of"]


def data_set_of(words: Sequence[str], prog: str) -> argparse.Namespace:
    """Read words ``name=value`` as the options ``--name value`` of ``openvclip evaluate``."""
    usage = "%(prog)s [protocol=NAME] annotations=PATH videos=FOLDER [classes=FILE] [label=TEXT]"
    parser = Parser(prog, usage, add_help=False, allow_abbrev=False)
    add_data_options(parser)
    parser.add_argument("--split", type=int)
    parser.add_argument("--label")
    pairs = (word.partition("=") for word in words)
    options = parser.parse_args([part for n, _, v in pairs for part in (f"--{n}", v) if part])
    if options.label is None:
        options.label = "+".join(options.protocol) or options.annotations.stem
        options.label += f"-{options.split}" if options.split is not None else ""
    return options


def chosen_splits(options: argparse.Namespace) -> list[Split]:
    """Return the splits of a data set, or the split that ``split=N`` asks for.

    Raises:
        OpenVCLIPError: lists, class names and videos do not fit, or there is no such split.
    """
    splits = splits_of(options)
    if options.split is None:
        return splits
    if not 1 <= options.split <= len(splits):
        raise UsageError(
            f"split={options.split}: {options.annotations} gives {len(splits)} splits; expected a "
            f"number from 1 to {len(splits)}."
        )
    return [splits[options.split - 1]]
