"""The command ``openvclip``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from openvclip.cli import (
    average,
    check_videos,
    convert,
    evaluate,
    inspect,
    interpolate,
    predict,
)
from openvclip.errors import OpenVCLIPError

_COMMANDS = (inspect, convert, interpolate, average, check_videos, evaluate, predict)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: what follows the command's name; the process's own by default.

    Returns:
        The exit status: 0, 1 where a check found something, 2 where an error was printed, or 130
        after Ctrl-C.
    """
    options = build_parser().parse_args(arguments)
    try:
        status: int | None = options.run(options)
    except OpenVCLIPError as error:
        print(f"openvclip {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"openvclip {options.command}: interrupted", file=sys.stderr)
        return 130  # as shells report a process that Ctrl-C ended
    return status or 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="openvclip", description="Weights that turn an image CLIP into a video model."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in _COMMANDS:
        module.add(commands)
    return parser
