"""The command line of a study that is repeated over seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from openvclip.commands import Parser


def read_arguments(
    name: str, description: str | None, arguments: Sequence[str] | None
) -> argparse.Namespace:
    """Return ``out``, ``seeds`` and ``smoke`` of the command ``python -m examples.shapes.NAME``."""
    parser = Parser(
        prog=f"python -m examples.shapes.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("shapes-out"), help="output folder")
    parser.add_argument(
        "--seeds", type=int, default=3, help="number of seeds (default: %(default)s)"
    )
    parser.add_argument("--smoke", action="store_true", help="run a few steps as a test")
    args = parser.parse_args(arguments)
    if args.seeds < 1:
        raise SystemExit(f"--seeds {args.seeds}: expected at least 1.")
    return args
