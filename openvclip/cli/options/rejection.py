"""Options for videos that are none of the labels."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from openvclip.errors import UsageError

if TYPE_CHECKING:
    from openvclip.checkpoints.contract import Confidence


def add_rejection_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--background`` and ``--reject``."""
    group = parser.add_argument_group("videos that are none of the labels")
    group.add_argument(
        "--background",
        metavar="TEXT",
        nargs="+",
        default=[],
        help="texts of what else a video can show; they share the probability with the labels, but "
        "they are never the answer",
    )
    group.add_argument(
        "--reject",
        metavar="THRESHOLD",
        nargs="?",
        type=float,
        const=True,
        help="print 'none of these' for a video whose score is below the threshold; the score is "
        "the highest cosine of a label, or the score of the calibrated model (default: the "
        "threshold of a calibrated model, if there is one)",
    )


def require_threshold(options: argparse.Namespace, confidence: Confidence | None) -> None:
    """Check ``--reject`` before a video is read.

    Args:
        options: the options.
        confidence: the calibration of the model, or ``None``.

    Raises:
        UsageError: there is no threshold, or the score can't have this value.
    """
    from openvclip.models.confidence import effective_confidence

    if options.reject is True and (confidence is None or confidence.threshold is None):
        raise UsageError(
            "--reject without a number uses the threshold of a calibrated model, and this model "
            "has none. Give a number, such as --reject 0.2, or run openvclip calibrate."
        )
    effective_confidence(confidence, options.reject)
