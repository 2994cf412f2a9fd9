"""What results say of a claim: differences paired by seed, and a rule for when they are clear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from examples.shapes.results import Numbers, Table
from examples.shapes.studies import Row

Verdict = Literal["holds", "opposite", "unclear"]

What = Literal["seen_test", "unseen", "curve"]
"""What is compared: the accuracy on a list, or the heights of two curves (:func:`heights`)."""

# Half the width of the 95 % confidence interval, in standard errors: Student's t by n - 1.
_WIDTHS = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}


@dataclass(frozen=True)
class Difference:
    """A difference of accuracies, by seed.

    Attributes:
        values: ``[seeds]``, in [-1, 1].
    """

    values: Numbers

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return float(self.values.mean())

    @property
    def verdict(self) -> Verdict:
        """``"holds"`` where the 95 % confidence interval of the mean lies above zero.

        ``"opposite"`` where it lies below, ``"unclear"`` otherwise and with a single seed.
        """
        n = len(self.values)
        if n < 2:
            return "unclear"
        width = _WIDTHS[n - 1] * float(self.values.std(ddof=1)) / n**0.5
        if abs(self.mean) <= width:
            return "unclear"
        return "holds" if self.mean > 0 else "opposite"

    def __str__(self) -> str:
        """In points, such as ``"+3.1 ± 0.9"``; one seed without the deviation."""
        points = 100 * self.values
        mean = f"{round(points.mean(), 1) + 0.0:+.1f}".replace("-", "−")  # no negative zero
        return mean if len(points) < 2 else f"{mean} ± {points.std(ddof=1):.1f}"


@dataclass(frozen=True)
class Point:
    """A row of a study at a lambda.

    Attributes:
        label: of the row; or what the labels of several rows begin with, before a comma: then it
            is the one of them that is best on the development shapes.
        lam: lambda; None is the one that is chosen on the development shapes.
    """

    label: str
    lam: float | None = 0.5


@dataclass(frozen=True)
class Claim:
    """That one point is better than another, as a sentence without its full stop.

    Attributes:
        text: the sentence.
        better: the point, or the row whose curve it is.
        worse: what it is compared with.
        what: what is compared.
    """

    text: str
    better: Point
    worse: Point
    what: What = "unseen"


def judge(claim: Claim, found: Table) -> Difference | None:
    """The difference that a claim is about; None where one of its points has no results."""
    better, worse = row_of(found, claim.better.label), row_of(found, claim.worse.label)
    if better is None or worse is None:
        return None
    if claim.what == "curve":
        return Difference(np.subtract(*heights(found, better, worse)))
    left = _values(found, better, claim.better.lam, claim.what)
    return Difference(left - _values(found, worse, claim.worse.lam, claim.what))


def row_of(found: Table, label: str) -> Row | None:
    """The row that a :class:`Point` means; None where there are no results for it."""
    if not found.seeds:
        return None
    rows = [row for row in found.rows if row.label == label or row.label.startswith(f"{label}, ")]

    def on_development(row: Row) -> float:
        return float(_values(found, row, None, "development").mean())

    return max(rows, key=on_development, default=None)


def _values(found: Table, row: Row, lam: float | None, name: str) -> Numbers:
    return found.at(row, found.chosen_lambda(row) if lam is None else lam, name)


def heights(found: Table, first: Row, second: Row) -> tuple[Numbers, Numbers]:
    """How high two rows' curves of unseen over seen accuracy lie, ``[seeds]`` each.

    A curve's height at a seen accuracy is the best unseen accuracy that it has there or further
    to the right: what one gets who wants at least that much on seen shapes. It is averaged over
    the seen accuracies that both curves reach, seed by seed. Between two lambdas the curve is a
    straight line.
    """
    curves = [
        (found.accuracies(row, "seen_test"), found.accuracies(row, "unseen"))
        for row in (first, second)
    ]
    means = np.empty((2, len(found.seeds)))
    for index in range(len(found.seeds)):
        pair = [(seen[index], unseen[index]) for seen, unseen in curves]
        low = max(seen.min() for seen, _ in pair)
        high = min(seen.max() for seen, _ in pair)
        wanted = np.linspace(min(low, high), high, 101)
        means[:, index] = [_height(seen, unseen, wanted) for seen, unseen in pair]
    return means[0], means[1]


def _height(seen: Numbers, unseen: Numbers, wanted: Numbers) -> float:
    best = np.where(seen[None] >= wanted[:, None], unseen[None], -np.inf).max(axis=1)
    for place in range(len(seen) - 1):  # where the line to the next point crosses
        (here, there), (low, high) = seen[place : place + 2], unseen[place : place + 2]
        crossed = (wanted > min(here, there)) & (wanted < max(here, there))
        way = (wanted[crossed] - here) / (there - here)
        best[crossed] = np.maximum(best[crossed], low + way * (high - low))
    return float(best.mean())
