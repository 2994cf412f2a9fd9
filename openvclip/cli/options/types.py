"""Types and options that several subcommands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeAlias

from openvclip.commands.parsing import Parser

if TYPE_CHECKING:
    # The type that add_subparsers returns. argparse does not export it.
    Commands: TypeAlias = argparse._SubParsersAction[Parser]
else:
    Commands = object


def add_allow_options(parser: argparse._ActionsContainer) -> None:
    """Add ``--allow-missing`` and ``--allow-unexpected``, which are lists of patterns."""
    for which, meaning in (
        ("missing", "weights that may be missing from the file"),
        ("unexpected", "weights that are left out if the file has them"),
    ):
        parser.add_argument(
            f"--allow-{which}",
            metavar="PATTERN",
            action="append",
            default=[],
            help=f"names of {meaning}; * and ? are wildcards; may be given several times "
            "(default: none)",
        )
