"""The rows of the page, the claims about them, and their verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from examples.shapes.results import Results
from examples.shapes.trials.cells import QUESTIONS, Question
from examples.shapes.trials.registry import METHODS
from examples.shapes.trials.statistics import LEVEL, holm, p_value

__all__ = ["Claim", "Judged", "Verdict", "accuracies", "claims_of", "judge", "lambda_of"]

Verdict = Literal["higher", "lower", "not clear"]

REFERENCE, PAPER = "FINE-TUNE", "Open-VCLIP"
"""The methods that all other methods are compared with."""


@dataclass(frozen=True)
class Claim:
    """The claim that two rows differ on a question.

    Attributes:
        method: name of the first method.
        lam: its λ; ``None`` is the chosen λ.
        other: name of the second method.
        other_lam: its λ.
        question: the question.
    """

    method: str
    lam: float | None
    other: str
    other_lam: float | None
    question: Question


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


def lambda_of(results: Results, method: str, lam: float | None) -> float:
    """Return a λ, or the chosen λ of a method if ``lam`` is ``None``."""
    return float(results["chosen"][method]["lam"] if lam is None else lam)


def accuracies(results: Results, method: str, lam: float | None, name: str) -> dict[str, float]:
    """Return the accuracies in [0, 1] of a method on a list, by the number of the cell."""
    if method not in results["chosen"]:
        return {}
    wanted = lambda_of(results, method, lam)
    values = {}
    for number, entry in results["cells"].items():
        points: list[dict[str, Any]] = entry["methods"].get(method, {}).get("points", [])
        for point in points:
            if point["lam"] == wanted:
                values[number] = float(point["accuracy"][name])
    return values


def claims_of(methods: Sequence[str]) -> list[Claim]:
    """Return the claims of the page about some methods.

    Plain fine-tuning (λ = 0) is compared with CLIP. Open-VCLIP is compared with CLIP and with plain
    fine-tuning. Every method is compared with plain fine-tuning at its best λ. A method that is
    like Open-VCLIP, but cheaper, is compared with Open-VCLIP.
    """
    claims = [Claim(REFERENCE, 0.0, "CLIP", None, question) for question in QUESTIONS]
    for other, lam in (("CLIP", None), (REFERENCE, 0.0)):
        claims += [Claim(PAPER, None, other, lam, question) for question in QUESTIONS]
    for name in methods:
        if name in ("CLIP", REFERENCE):
            continue
        claims += [Claim(name, None, REFERENCE, None, question) for question in QUESTIONS]
    for name in methods:
        if name in METHODS and METHODS[name].like == PAPER:
            claims += [Claim(name, None, PAPER, None, question) for question in QUESTIONS]
    known = {*methods}
    return [claim for claim in claims if {claim.method, claim.other} <= known]


def judge(results: Results, claims: Sequence[Claim]) -> list[Judged]:
    """Judge the claims. Claims without a common cell are left out, and not counted."""
    pairs = []
    for claim in claims:
        first = accuracies(results, claim.method, claim.lam, claim.question)
        second = accuracies(results, claim.other, claim.other_lam, claim.question)
        common = [number for number in first if number in second]
        if common:
            pairs.append((claim, tuple(first[n] - second[n] for n in common)))
    corrected = holm([p_value(differences) for _, differences in pairs])
    return [Judged(claim, values, p) for (claim, values), p in zip(pairs, corrected, strict=True)]
