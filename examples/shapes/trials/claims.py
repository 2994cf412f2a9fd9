"""The claims about the rows of the page, and their verdicts.

Each claim costs power, because Holm's correction divides by the number of claims. So there are
only claims on which a sentence of the page "Which method when" depends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from examples.shapes.results import Results
from examples.shapes.trials.cells import QUESTIONS
from examples.shapes.trials.reading import MEAN, OUTCOMES, Outcome, accuracies, lambda_of
from examples.shapes.trials.registry import METHODS, PAPER, REFERENCE
from examples.shapes.trials.statistics import LEVEL, holm, p_value

__all__ = ["Claim", "Judged", "Verdict", "claims_of", "judge"]

Verdict = Literal["higher", "lower", "not clear"]


@dataclass(frozen=True)
class Claim:
    """The claim that two rows differ on a question.

    Attributes:
        method: name of the first method.
        lam: its λ; ``None`` is the chosen λ.
        other: name of the second method.
        other_lam: its λ.
        question: the question, or ``"mean"`` for the mean of the three questions.
    """

    method: str
    lam: float | None
    other: str
    other_lam: float | None
    question: Outcome


@dataclass(frozen=True)
class Judged:
    """A claim with its result.

    Attributes:
        claim: the claim.
        differences: the differences in [-1, 1], one for each cell with both rows.
        p: the p-value after Holm's correction for all claims of the page.
    """

    claim: Claim
    differences: tuple[float, ...]
    p: float

    @property
    def mean(self) -> float:
        """The mean difference."""
        return float(np.mean(self.differences))

    @property
    def deviation(self) -> float:
        """The standard deviation of the differences over the cells."""
        return float(np.std(self.differences, ddof=1)) if len(self.differences) > 1 else 0.0

    @property
    def verdict(self) -> Verdict:
        """Whether the first row is clearly higher or lower than the second row."""
        if self.p >= LEVEL:
            return "not clear"
        return "higher" if self.mean > 0 else "lower"


def claims_of(methods: Sequence[str]) -> list[Claim]:
    """Return the claims of the page about some methods.

    - On each question: plain fine-tuning (λ = 0) against CLIP, plain fine-tuning at its chosen λ
      against λ = 0 and against CLIP, and Open-VCLIP against CLIP.
    - Every method against plain fine-tuning at its chosen λ: on the mean of the three questions,
      and on each question, unless the method changes one part of another method (``like``).
    - On each of these: a method against its control.
    - On the mean: a method against the methods that its entry names (``beside``).
    """
    general: tuple[tuple[str, float | None, str, float | None], ...] = (
        (REFERENCE, 0.0, "CLIP", None),
        (REFERENCE, None, REFERENCE, 0.0),
        (REFERENCE, None, "CLIP", None),
        (PAPER, None, "CLIP", None),
    )
    claims = [
        Claim(method, lam, other, other_lam, question)
        for method, lam, other, other_lam in general
        for question in QUESTIONS
    ]
    for name in methods:
        if name not in ("CLIP", REFERENCE):
            is_part = name in METHODS and METHODS[name].like is not None
            outcomes: Sequence[Outcome] = (MEAN,) if is_part else OUTCOMES
            claims += [Claim(name, None, REFERENCE, None, outcome) for outcome in outcomes]
    claims += [
        Claim(str(METHODS[name].like), None, name, None, outcome)
        for name in methods
        if name in METHODS and METHODS[name].control
        for outcome in OUTCOMES
    ]
    for name in methods:
        for other in METHODS[name].beside if name in METHODS else ():
            claims.append(Claim(name, None, other, None, MEAN))
    known = {*methods}
    return [claim for claim in claims if {claim.method, claim.other} <= known]


def judge(results: Results, claims: Sequence[Claim]) -> list[Judged]:
    """Judge the claims. Claims without a common cell are left out, and not counted.

    If 0 is the chosen λ of a method, two claims can be the same, and a claim can compare a row with
    itself. Such a claim is counted once, or left out.
    """
    pairs, rows = [], set()
    for claim in claims:
        lams = (
            lambda_of(results, claim.method, claim.lam),
            lambda_of(results, claim.other, claim.other_lam),
        )
        row = (claim.method, lams[0], claim.other, lams[1], claim.question)
        if row in rows or row[:2] == row[2:4]:
            continue
        rows.add(row)
        first = accuracies(results, claim.method, claim.lam, claim.question)
        second = accuracies(results, claim.other, claim.other_lam, claim.question)
        common = [number for number in first if number in second]
        if common:
            pairs.append((claim, tuple(first[n] - second[n] for n in common)))
    corrected = holm([p_value(differences) for _, differences in pairs])
    return [Judged(claim, values, p) for (claim, values), p in zip(pairs, corrected, strict=True)]
