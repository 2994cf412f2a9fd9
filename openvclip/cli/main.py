"""Parse the command line of ``openvclip`` and run a subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from openvclip.cli import (
    app,
    average,
    calibrate,
    check_videos,
    convert,
    evaluate,
    index,
    inspect,
    interpolate,
    merge,
    predict,
    report,
    search,
)
from openvclip.commands.parsing import Parser
from openvclip.commands.streams import CLOSED_PIPE, standard_streams
from openvclip.errors import OpenVCLIPError

# A new subcommand is a module with a function add(commands), imported above and listed here.
_SUBCOMMANDS = (
    inspect,
    convert,
    interpolate,
    average,
    merge,
    check_videos,
    evaluate,
    report,
    predict,
    calibrate,
    index,
    search,
    app,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``openvclip``.

    Args:
        arguments: the command line without the name of the command. Default: the command line of
            this process.

    Returns:
        The exit status: 0 for success, 1 if a check found problems, 2 after an error, 130 after
        Ctrl-C, 141 if the reader of the output is gone.
    """
    try:
        with standard_streams():
            return _run(arguments)
    except SystemExit as stopped:
        if stopped.code == CLOSED_PIPE:
            return CLOSED_PIPE
        raise


def _run(arguments: Sequence[str] | None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        status: int | None = options.run(options)
    except OpenVCLIPError as error:
        print(f"openvclip {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"openvclip {options.command}: interrupted", file=sys.stderr)
        return 130  # the status that shells report for a process that Ctrl-C ended
    return status or 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command ``openvclip`` with all subcommands."""
    parser = Parser(
        prog="openvclip",
        description="Convert, merge and evaluate CLIP weights, and use them on videos.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in _SUBCOMMANDS:
        module.add(commands)
    return parser
