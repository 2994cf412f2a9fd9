"""What the commands that write weights have in common: the options of their output."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from openvclip.errors import CheckpointError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class OutputOptions(TypedDict):
    """Keyword arguments of the functions that write files."""

    dtype: torch.dtype | None
    max_shard_size: int | None


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add what to write, how and whether over an older file."""
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=Path,
        required=True,
        help="file to write: *.safetensors, or *.safetensors.index.json for shards",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype to store floating-point weights in (as they are)"
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=_bytes,
        help="bytes of the largest shard, such as 500MB or 2GB (5GB)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT where it exists")


def options_of(options: argparse.Namespace) -> OutputOptions:
    """The chosen options, for the functions that write files."""
    import torch

    dtype = getattr(torch, options.dtype) if options.dtype else None
    return {"dtype": dtype, "max_shard_size": options.max_shard_size}


def require_free(outs: Iterable[Path], *, overwrite: bool) -> None:
    """Raise where a file exists and is not to be replaced.

    Raises:
        CheckpointError: one exists.
    """
    for out in outs:
        if out.exists() and not overwrite:
            raise CheckpointError(f"{out} exists; give --overwrite to replace it.")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([KMG]?B|)", text.strip(), re.IGNORECASE)
    if not found or found[2].upper() not in _UNITS or not int(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 500MB or 2GB")
    return int(found[1]) * _UNITS[found[2].upper()]
