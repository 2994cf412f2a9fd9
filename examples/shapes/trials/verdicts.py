"""The tables of the claims, and of the differences that can be seen."""

from __future__ import annotations

import numpy as np

from examples.shapes.results import Results, wrapped
from examples.shapes.trials.cells import QUESTIONS
from examples.shapes.trials.claims import Judged
from examples.shapes.trials.statistics import LEVEL, cells_needed, power, smallest_difference
from examples.shapes.trials.tables import HEADS
from openvclip.evaluation import markdown_table

__all__ = ["claims_table", "power_table", "summary"]

DIFFERENCE = 0.015
"""The true difference that the number of cells is chosen for."""


def claims_table(judged: list[Judged]) -> str:
    """Return the differences of each pair of rows in points, and their p-values."""
    rows: dict[tuple[str, ...], dict[str, Judged]] = {}
    for item in judged:
        claim = item.claim
        lams = ["chosen" if lam is None else f"{lam:g}" for lam in (claim.lam, claim.other_lam)]
        pair = (claim.method, lams[0], claim.other, lams[1])
        rows.setdefault(pair, {})[claim.question] = item
    header = ["method", "λ", "compared with", "its λ"]
    for question in QUESTIONS:
        header += [HEADS[question], "p"]
    lines = []
    for names, by_question in rows.items():
        cells = list(names)
        for question in QUESTIONS:
            found = by_question.get(question)
            cells += ["", ""] if found is None else [_difference(found), _p(found)]
        lines.append(cells)
    return markdown_table(header, lines)


def _difference(item: Judged) -> str:
    return points(item) if item.verdict == "not clear" else f"**{points(item)}**"


def _p(item: Judged) -> str:
    return f"{item.p:.3f}" if item.p >= 0.001 else "< 0.001"


def points(item: Judged) -> str:
    """Return a difference in points of accuracy, such as ``"+1.2 ± 0.8"``."""
    mean = f"{round(100 * item.mean, 1) + 0.0:+.1f}".replace("-", "−")
    if len(item.differences) < 2:
        return mean
    return f"{mean} ± {100 * item.deviation:.1f}"


def summary(judged: list[Judged]) -> str:
    count = dict.fromkeys(("higher", "lower", "not clear"), 0)
    for item in judged:
        count[item.verdict] += 1
    return wrapped(
        f"The page judges {len(judged)} claims. In {count['higher']} of them the first method is "
        f"clearly higher, in {count['lower']} it is clearly lower, and {count['not clear']} are "
        "not clear."
    )


def power_table(results: Results, judged: list[Judged]) -> str:
    cells = len(results["cells"])
    deviations = sorted(item.deviation for item in judged if len(item.differences) > 1)
    if not deviations:
        return "With one cell there are no verdicts."
    level = LEVEL / len(judged)
    rows = []
    for name, share in (("median", 0.5), ("90 % of the claims", 0.9)):
        deviation = float(np.quantile(deviations, share))
        needed = cells_needed(deviation, DIFFERENCE, level)
        rows.append(
            [
                name,
                f"{100 * deviation:.1f}",
                f"{100 * power(cells, deviation, DIFFERENCE, level):.0f} %",
                f"{100 * smallest_difference(cells, deviation, level):.1f}",
                "more than 500" if needed is None else str(needed),
            ]
        )
    header = [
        "deviation of the differences",
        "points",
        "1.5 points are called clear",
        "clear nine times in ten",
        "cells for 1.5 points",
    ]
    return markdown_table(header, rows)
