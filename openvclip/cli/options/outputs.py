"""The options of commands that write files of weights."""

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


class WriteOptions(TypedDict):
    """Keyword arguments of the functions that merge files."""

    dtype: torch.dtype | None
    max_shard_size: int | None
    override: bool


def add_output_options(parser: argparse.ArgumentParser, output_help: str) -> None:
    """Add ``--output``, ``--overwrite`` and ``--dtype``."""
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help=output_help)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUT if it exists (default: keep it and end with an error)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype in which floating-point weights are stored (default: the dtype of each entry)",
    )


def add_merge_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`add_output_options` and ``--max-shard-size``."""
    add_output_options(
        parser, "file to write: *.safetensors, or *.safetensors.index.json to write shards"
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        type=_bytes,
        help="largest size of a shard, such as 500MB or 2GB; only if OUT is an index "
        "(default: 5GB)",
    )
    add_override_option(
        parser,
        "use the contract of the last input if the contracts of the inputs differ, leave out a "
        "contract that can't be read, and add a task vector to another model than its original",
    )


def add_override_option(parser: argparse._ActionsContainer, effect: str) -> None:
    """Add ``--override``.

    Args:
        parser: the parser, or a group of options.
        effect: what the option does.
    """
    parser.add_argument(
        "--override", action="store_true", help=f"{effect} (default: end with an error)"
    )


def dtype_option(options: argparse.Namespace) -> torch.dtype | None:
    """Return the dtype that was chosen with ``--dtype``."""
    import torch

    return getattr(torch, options.dtype) if options.dtype else None


def write_options(options: argparse.Namespace) -> WriteOptions:
    """Return the chosen options as keyword arguments of the functions that merge files."""
    return {
        "dtype": dtype_option(options),
        "max_shard_size": options.max_shard_size,
        "override": options.override,
    }


def require_free(outs: Iterable[Path], *, overwrite: bool) -> None:
    """Check that no output exists, unless existing files may be replaced.

    Raises:
        CheckpointError: a file exists, and ``overwrite`` is false.
    """
    for out in outs:
        if out.exists() and not overwrite:
            raise CheckpointError(f"{out} exists; give --overwrite to replace it.")


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMG]?B|)", text.strip(), re.IGNORECASE)
    if not match or match[2].upper() not in _UNITS or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 500MB or 2GB")
    return int(match[1]) * _UNITS[match[2].upper()]
