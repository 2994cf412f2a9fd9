"""The table of the claims, and the differences that can be seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from examples.shapes.results import Results
from examples.shapes.trials.claims import Judged
from examples.shapes.trials.reading import MEAN, Outcome
from examples.shapes.trials.registry import REFERENCE
from examples.shapes.trials.statistics import LEVEL, cells_needed, power, smallest_difference
from examples.shapes.trials.wording import HEADS, difference, p_text
from openvclip.evaluation import markdown_table

__all__ = [
    "DIFFERENCE",
    "Power",
    "claims_table",
    "power_table",
    "power_text",
    "powers",
    "summary",
]

DIFFERENCE = 0.015
"""The true difference that the number of cells is chosen for."""


def claims_table(judged: Sequence[Judged], outcomes: Sequence[Outcome]) -> str:
    """Return the differences of each pair of rows in points, and their p-values.

    Args:
        judged: the claims.
        outcomes: the questions of the table; pairs without a claim on them are left out.
    """
    rows: dict[tuple[str, str], dict[str, Judged]] = {}
    for item in judged:
        claim = item.claim
        if claim.question in outcomes:
            pair = (_row(claim.method, claim.lam), _row(claim.other, claim.other_lam))
            rows.setdefault(pair, {})[claim.question] = item
    header = ["method", "compared with"]
    for outcome in outcomes:
        header += [HEADS[outcome], "p"]
    lines = []
    for names, by_outcome in rows.items():
        cells = list(names)
        for outcome in outcomes:
            found = by_outcome.get(outcome)
            cells += ["", ""] if found is None else [difference(found), p_text(found)]
        lines.append(cells)
    return markdown_table(header, lines)


def _row(name: str, lam: float | None) -> str:
    return name if lam is None else f"{name} (λ = {lam:g})"


def summary(judged: Sequence[Judged]) -> str:
    """Return how many claims have which verdict, as a sentence."""
    count = dict.fromkeys(("higher", "lower", "not clear"), 0)
    for item in judged:
        count[item.verdict] += 1
    return (
        f"The page judges {len(judged)} claims. In {count['higher']} of them the first method is "
        f"clearly higher, in {count['lower']} it is clearly lower, and {count['not clear']} are "
        "not clear."
    )


@dataclass(frozen=True)
class Power:
    """What the number of cells can show.

    Attributes:
        text: what is compared.
        deviation: standard deviation of the differences over the cells, in [0, 1].
        probability: probability that a true difference of :data:`DIFFERENCE` is called clear.
        smallest: the smallest true difference that is called clear nine times in ten.
        cells: number of cells for which this difference is :data:`DIFFERENCE`, if at most 500.
    """

    text: str
    deviation: float
    probability: float
    smallest: float
    cells: int | None

    @property
    def smallest_text(self) -> str:
        """The smallest difference in points."""
        return "more than 100" if self.smallest > 1 else f"{100 * self.smallest:.1f}"


def powers(results: Results, judged: Sequence[Judged]) -> list[Power]:
    """Return the power for the median and the 90 % quantile of the measured deviations.

    Only claims about two methods are used, without CLIP: the differences of the other claims are
    large. The level is that of the first step of Holm's correction.
    """
    cells, found = len(results["cells"]), []
    for text, is_mean in (("mean of the three questions", True), ("one question", False)):
        deviations = [
            item.deviation
            for item in judged
            if (item.claim.question == MEAN) == is_mean
            and item.claim.other != "CLIP"
            and item.claim.method != REFERENCE
            and item.deviation > 0
        ]
        for name, share in (("median", 0.5), ("9 of 10 claims", 0.9)):
            if deviations:
                deviation, level = float(np.quantile(deviations, share)), LEVEL / len(judged)
                found.append(
                    Power(
                        f"{text}, {name}",
                        deviation,
                        power(cells, deviation, DIFFERENCE, level),
                        smallest_difference(cells, deviation, level),
                        cells_needed(deviation, DIFFERENCE, level),
                    )
                )
    return found


def power_text(results: Results, judged: Sequence[Judged]) -> str:
    """Return what the number of cells can show; empty if there is no power to compute."""
    found = powers(results, judged)
    if len(found) < 4:  # claims on the mean alone, or on the questions alone
        return ""
    mean, wide_mean, question, wide_question = found
    link = "[How this is computed](#how-small-a-difference-is-seen)."
    if mean.smallest > 1:
        return f"With so few cells, hardly any difference can be called clear. {link}"
    return (
        "For the claim with the median deviation over the cells, a true difference of 1.5 points "
        "between two methods is called clear in "
        f"{100 * mean.probability:.0f} % of all cases in the mean of the three questions, and in "
        f"{100 * question.probability:.0f} % on one question. A true difference of "
        f"{mean.smallest_text} points in the mean, or of {question.smallest_text} points on one "
        "question, is called clear nine times in ten. The differences of other methods vary more: "
        f"for one claim in ten, it takes {wide_mean.smallest_text} points or more in the mean, and "
        f"{wide_question.smallest_text} or more on one question. {link}"
    )


def power_table(results: Results, judged: Sequence[Judged]) -> str:
    """Return the power at the measured deviations."""
    rows = [
        [
            each.text,
            f"{100 * each.deviation:.2f}",
            f"{100 * each.probability:.0f} %",
            each.smallest_text,
            "more than 500" if each.cells is None else str(each.cells),
        ]
        for each in powers(results, judged)
    ]
    if not rows:
        return "With one cell there are no verdicts."
    header = [
        "deviation of the differences",
        "points",
        "1.5 points are called clear",
        "clear nine times in ten",
        "cells for 1.5 points",
    ]
    return markdown_table(header, rows)
