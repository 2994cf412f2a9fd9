"""What the modules of subcommands share: what they add themselves to, and options of several."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    # The type of what add_subparsers returns; it is private to argparse.
    Commands: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Commands = object


def add_allow_options(parser: argparse._ActionsContainer) -> None:
    """Weights by name that a checkpoint may lack, or have too many: patterns, in lists."""
    for what, meaning in (
        ("missing", "that need not be in the file"),
        ("unexpected", "in the file to leave out"),
    ):
        parser.add_argument(
            f"--allow-{what}",
            metavar="PATTERN",
            action="append",
            default=[],
            help=f"names of weights {meaning}, with * and ?; can be given several times",
        )
