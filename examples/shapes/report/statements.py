"""Verdicts on claims: differences paired by seed, and the rule for a clear difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from examples.shapes.results import Numbers, Table
from examples.shapes.studies import Row

Verdict = Literal["holds", "opposite", "unclear"]

What = Literal["seen_test", "unseen", "curve"]
"""The quantity that a claim compares: an accuracy on a list, or :func:`heights` of curves."""

# Half the width of the 95 % confidence interval, in standard errors: Student's t, by n - 1.
_WIDTHS = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}


@dataclass(frozen=True)
class Difference:
    """The difference of two accuracies for each seed.

    Attributes:
        values: the differences ``[seeds]``, in [-1, 1].
    """

    values: Numbers

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return float(self.values.mean())

    @property
    def verdict(self) -> Verdict:
        """``"holds"`` if the 95 % confidence interval of the mean lies above zero.

        ``"opposite"`` if the interval lies below zero; ``"unclear"`` otherwise, and for one seed.
        """
        n = len(self.values)
        if n < 2:
            return "unclear"
        width = _WIDTHS[n - 1] * float(self.values.std(ddof=1)) / n**0.5
        if abs(self.mean) <= width:
            return "unclear"
        return "holds" if self.mean > 0 else "opposite"

    def __str__(self) -> str:
        """Text in points of accuracy, such as ``"+3.1 ± 0.9"``; one seed has no deviation."""
        points = 100 * self.values
        mean = f"{round(points.mean(), 1) + 0.0:+.1f}".replace("-", "−")  # no negative zero
        return mean if len(points) < 2 else f"{mean} ± {points.std(ddof=1):.1f}"


@dataclass(frozen=True)
class Point:
    """A row of a study at one lambda.

    Attributes:
        label: the label of the row, or the part of the label before a comma. If several rows match,
            the row with the highest accuracy on the development shapes is taken.
        lam: the lambda; ``None`` means the lambda that is chosen on the development shapes.
    """

    label: str
    lam: float | None = 0.5


@dataclass(frozen=True)
class Claim:
    """The claim that one point is better than another.

    Attributes:
        text: the claim as a sentence, without the full stop.
        better: the point (or the row of the curve) that is claimed to be better.
        worse: the point (or the row of the curve) that is claimed to be worse.
        what: the quantity that is compared.
    """

    text: str
    better: Point
    worse: Point
    what: What = "unseen"


def judge(claim: Claim, table: Table) -> Difference | None:
    """Return the difference of the claim's points, or ``None`` if a point has no results."""
    better, worse = row_of(table, claim.better.label), row_of(table, claim.worse.label)
    if better is None or worse is None:
        return None
    if claim.what == "curve":
        return Difference(np.subtract(*heights(table, better, worse)))
    left = _values(table, better, claim.better.lam, claim.what)
    return Difference(left - _values(table, worse, claim.worse.lam, claim.what))


def row_of(table: Table, label: str) -> Row | None:
    """Return the row of a :class:`Point`, or ``None`` if the row has no results."""
    if not table.seeds:
        return None
    rows = [row for row in table.rows if row.label == label or row.label.startswith(f"{label}, ")]

    def on_development(row: Row) -> float:
        return float(_values(table, row, None, "development").mean())

    return max(rows, key=on_development, default=None)


def _values(table: Table, row: Row, lam: float | None, name: str) -> Numbers:
    return table.at(row, table.chosen_lambda(row) if lam is None else lam, name)


def heights(table: Table, first: Row, second: Row) -> tuple[Numbers, Numbers]:
    """Return the mean heights of the curves of two rows, ``[seeds]`` each.

    A curve shows the accuracy on unseen shapes over the accuracy on seen shapes, with straight
    lines between the lambdas. Take the part of a curve where the accuracy on seen shapes is at
    least x. The height of the curve at x is the highest accuracy on unseen shapes on this part. For
    each seed, the mean height is taken over all x that both curves reach.
    """
    curves = [
        (table.accuracies(row, "seen_test"), table.accuracies(row, "unseen"))
        for row in (first, second)
    ]
    means = np.empty((2, len(table.seeds)))
    for index in range(len(table.seeds)):
        pair = [(seen[index], unseen[index]) for seen, unseen in curves]
        low = max(seen.min() for seen, _ in pair)
        high = min(seen.max() for seen, _ in pair)
        wanted = np.linspace(min(low, high), high, 101)
        means[:, index] = [_height(seen, unseen, wanted) for seen, unseen in pair]
    return means[0], means[1]


def _height(seen: Numbers, unseen: Numbers, wanted: Numbers) -> float:
    best = np.where(seen[None] >= wanted[:, None], unseen[None], -np.inf).max(axis=1)
    for place in range(len(seen) - 1):  # the line from a point to the next one
        (start, end), (low, high) = seen[place : place + 2], unseen[place : place + 2]
        crossed = (wanted > min(start, end)) & (wanted < max(start, end))
        way = (wanted[crossed] - start) / (end - start)
        best[crossed] = np.maximum(best[crossed], low + way * (high - low))
    return float(best.mean())
