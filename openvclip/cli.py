"""The command ``openvclip``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from openvclip.commands import convert, inspect
from openvclip.errors import OpenVCLIPError

_COMMANDS = (inspect, convert)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: what follows the command's name; the process's own by default.

    Returns:
        The exit status: 0, or 2 where an error was printed.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except OpenVCLIPError as error:
        print(f"openvclip {options.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="openvclip", description="Weights that turn an image CLIP into a video model."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in _COMMANDS:
        module.add(commands)
    return parser
