"""The command line of :mod:`examples.tradeoff`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from openvclip.cli.options import data, models
from openvclip.evaluation import FIGURE_LAMBDAS

BASELINE = "CLIP, frame by frame"

_Fail = Callable[[str], NoReturn]


@dataclass(frozen=True)
class Line:
    """A curve to compute.

    Attributes:
        label: what the legend says.
        path: the fine-tuned weights; ``None`` for the original CLIP, which is a single point.
        temporal: whether frames attend to their neighbours.
        star: the lambda of the reported point.
    """

    label: str
    path: Path | None
    temporal: bool
    star: float | None = None


def parse_arguments(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Returns:
        What argparse finds, with ``lines`` (a :class:`Line` for each curve), and in
        ``closed_set`` and ``zero_shot`` the options of each data set, with its ``label``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_figure_options(parser)
    models.add_model_options(parser, checkpoint=False)
    parser.add_argument(
        "--hf", metavar="NAME|FOLDER", help="a CLIP of Hugging Face instead, through transformers"
    )
    models.add_frame_options(parser)
    group = parser.add_argument_group("run and results")
    group.add_argument("--batch-size", type=int, default=8, help="videos at a time (%(default)s)")
    group.add_argument(
        "--num-workers", type=int, default=4, help="processes that decode (%(default)s)"
    )
    group.add_argument("--out", type=Path, required=True, help="folder for everything")
    args = parser.parse_args(arguments)
    for lam in args.lams:
        if not 0 <= lam <= 1:
            parser.error(f"--lams {lam:g}: expected weights of the original CLIP in [0, 1]")
    args.lines = _lines(args, parser.error)
    args.closed_set = _data_set(args.closed_set, f"{parser.prog} --closed-set")
    args.zero_shot = [_data_set(words, f"{parser.prog} --zero-shot") for words in args.zero_shot]
    for things in (args.lines, [args.closed_set, *args.zero_shot]):
        _require_apart([thing.label for thing in things], parser.error)
    return args


def file_name(label: str) -> str:
    """A label as a part of a path."""
    return re.sub(r"[^\w.+-]+", "-", label).strip("-.").lower() or "-"


def _add_figure_options(parser: argparse.ArgumentParser) -> None:
    """The curves, the data sets and the points."""
    group = parser.add_argument_group("curves and data sets")
    for flag, meaning in (
        ("--curve", "fine-tuned weights with temporal attention, of any known family"),
        ("--frame-curve", "those of a model that was fine-tuned frame by frame"),
    ):
        group.add_argument(
            flag,
            metavar="LABEL=FILE",
            action="append",
            default=[],
            help=f"{meaning}; can be given several times",
        )
    group.add_argument(
        "--baseline", action="store_true", help="mark the original CLIP, applied frame by frame"
    )
    group.add_argument(
        "--closed-set",
        metavar="NAME=VALUE",
        nargs="+",
        required=True,
        help="videos of the classes that were trained on",
    )
    group.add_argument(
        "--zero-shot",
        metavar="NAME=VALUE",
        nargs="+",
        action="append",
        required=True,
        help="videos of other classes; can be given several times, each gives a figure",
    )
    group.add_argument(
        "--lams",
        type=float,
        nargs="+",
        default=list(FIGURE_LAMBDAS),
        help="weights of the original CLIP (those of the paper's figures)",
    )
    group.add_argument(
        "--mark",
        metavar="LABEL=LAM",
        action="append",
        default=[],
        help="draw this curve thick, with a star at the reported lambda; several times",
    )


def _lines(args: argparse.Namespace, fail: _Fail) -> list[Line]:
    """The curves in the order in which they are drawn."""
    stars = dict(_pair(text, "--mark", "LABEL=LAM", fail) for text in args.mark)
    lines = [Line(BASELINE, None, temporal=False)] if args.baseline else []
    for flag, texts in (("--frame-curve", args.frame_curve), ("--curve", args.curve)):
        for text in texts:
            label, path = _pair(text, flag, "LABEL=FILE", fail)
            star = next((lam for lam in args.lams if f"{lam:g}" == stars.get(label)), None)
            lines.append(Line(label, Path(path), flag == "--curve", star))
    if not args.curve and not args.frame_curve:
        fail("give --curve LABEL=FILE, a checkpoint that is interpolated with CLIP")
    starred = {line.label for line in lines if line.star is not None}
    for label, lam in stars.items():
        if label not in starred:
            fail(f"--mark {label}={lam}: expected the label of a curve and one of --lams")
    return lines


def _pair(text: str, flag: str, expected: str, fail: _Fail) -> tuple[str, str]:
    label, _, value = text.partition("=")
    if not label or not value:
        fail(f"{flag} {text}: expected {expected}")
    return label, value


def _data_set(words: Sequence[str], prog: str) -> argparse.Namespace:
    """Read words ``name=value`` as the options ``--name value`` of ``openvclip evaluate``."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [protocol=NAME] annotations=PATH videos=FOLDER [classes=FILE] [label=TEXT]",
        add_help=False,
        allow_abbrev=False,
    )
    data.add_data_options(parser)
    parser.add_argument("--split", type=int)
    parser.add_argument("--label")
    given = (word.partition("=") for word in words)
    options = parser.parse_args([part for n, _, v in given for part in (f"--{n}", v) if part])
    if options.label is None:
        options.label = "+".join(options.protocol) or options.annotations.stem
        options.label += f"-{options.split}" if options.split is not None else ""
    return options


def _require_apart(labels: list[str], fail: _Fail) -> None:
    """Labels name folders and files too: no two may come out the same."""
    names = [file_name(label) for label in labels]
    for label, name in zip(labels, names, strict=True):
        if names.count(name) > 1:
            fail(f"{label!r} labels two curves or data sets; give each a label of its own")
