"""Heads of columns, differences and p-values as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from examples.shapes.trials.claims import Judged
from examples.shapes.trials.reading import MEAN
from examples.shapes.trials.tasks import STILLS

__all__ = ["HEADS", "difference", "p_text", "points", "signed"]

HEADS = {
    "trained": "trained classes",
    "shapes": "unseen shapes",
    "actions": "unseen shapes and actions",
    MEAN: "mean of the three",
    STILLS: "stills",
}
"""The heads of the columns."""


def points(mean: float) -> str:
    """Return a difference of two accuracies in points, such as ``"+1.2"``."""
    return f"{round(100 * mean, 1) + 0.0:+.1f}".replace("-", "−")


def signed(differences: Sequence[float]) -> str:
    """Return the mean ± the standard deviation of differences, such as ``"+1.2 ± 0.8"``."""
    mean = points(float(np.mean(differences)))
    if len(differences) < 2:
        return mean
    return f"{mean} ± {100 * float(np.std(differences, ddof=1)):.1f}"


def difference(item: Judged) -> str:
    """Return the differences of a claim; bold if they are clear."""
    text = signed(item.differences)
    return text if item.verdict == "not clear" else f"**{text}**"


def p_text(item: Judged) -> str:
    """Return the p-value of a claim."""
    return f"{item.p:.3f}" if item.p >= 0.001 else "< 0.001"
