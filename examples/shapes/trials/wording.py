"""Heads of columns, differences and p-values as text, and the lines of a page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from textwrap import fill

import numpy as np

from examples.shapes.results import Results
from examples.shapes.trials.cells import DIVISIONS
from examples.shapes.trials.claims import Judged
from examples.shapes.trials.reading import MEAN
from examples.shapes.trials.settings import FULL
from examples.shapes.trials.tasks import STILLS

__all__ = ["HEADS", "cells_text", "difference", "p_text", "points", "signed", "wrapped_page"]

COLUMNS = 120
"""The width of the lines of a page."""

HEADS = {
    "trained": "trained classes",
    "shapes": "unseen shapes",
    "actions": "unseen shapes and actions",
    MEAN: "mean of the three",
    STILLS: "stills",
}
"""The heads of the columns."""


def cells_text(results: Results) -> str:
    """Return from how many cells the numbers come, as a sentence."""
    numbers = [int(number) for number in results["cells"]]
    count, divisions = len(numbers), {number % len(DIVISIONS) for number in numbers}
    if count >= FULL.cells:
        return f"The numbers come from all {count} cells."
    if count == len(divisions) == len(DIVISIONS):
        return (
            f"The numbers come from {count} of {FULL.cells} cells so far: each division of the "
            "actions once."
        )
    return (
        f"The numbers come from {count} of {FULL.cells} cells so far, and the other cells can "
        "change them."
    )


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


def wrapped_page(text: str) -> str:
    """Wrap the paragraphs and the lists of a page in Markdown; code, tables and heads stay."""
    code = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
    parts = (
        part if part.startswith("```") else "\n\n".join(map(_wrapped, re.split(r"\n{2,}", part)))
        for part in code.split(text)
    )
    return "".join(parts).strip() + "\n"


def _wrapped(block: str) -> str:
    if block.startswith(("|", "#", "<!--", "![")):
        return block
    if block.startswith("- "):
        return "\n".join(_lines(item, "- ") for item in block[2:].split("\n- "))
    return _lines(block, "")


def _lines(text: str, bullet: str) -> str:
    # A line that starts with "+ " or "* " is an item of a list in Markdown.
    bound = re.sub(r" ([+*-] |%)", "\0\\1", " ".join(text.split()))
    lines = fill(
        bound,
        COLUMNS,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines.replace("\0", " ")
