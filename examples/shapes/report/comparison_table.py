"""What the results of the comparison say: rows, quantities, and differences paired by seed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import numpy as np

from examples.shapes.comparison_settings import METHODS
from examples.shapes.report.statements import Difference
from examples.shapes.results import Results


@dataclass(frozen=True)
class Row:
    """A line of the tables: a method with the last weights, or with those at the chosen lambda."""

    label: str
    method: str
    end: Literal["last", "chosen"]


def _rows() -> tuple[Row, ...]:
    rows = []
    for name, method in METHODS.items():
        if not method.regularised:
            rows.append(Row(name, name, "last"))
        if method.interpolated:
            label = name if method.regularised else f"{name}, interpolated"
            rows.append(Row(label, name, "chosen"))
    return tuple(rows)


ROWS = _rows()
"""All rows, in the order of the tables."""


@dataclass(frozen=True)
class Quantity:
    """A column of the tables: accuracy on one test of a setting, or the harmonic mean of two."""

    label: str
    setting: str
    tests: tuple[str, ...]


def harmonic_mean(base: float, novel: float) -> float:
    """``2 / (1 / base + 1 / novel)``, 0 where one of them is 0."""
    return 0.0 if base == 0 or novel == 0 else 2 / (1 / base + 1 / novel)


def quantities(settings: dict[str, Any]) -> list[Quantity]:
    """The columns that the settings of a results file make."""
    found = []
    for name, setting in settings.items():
        if setting["base"]:
            found += [Quantity(test, name, (test,)) for test in ("base", "novel")]
            found.append(Quantity("harmonic mean", name, ("base", "novel")))
        elif "unseen" in setting["tests"]:
            found.append(Quantity("closed set", name, ("seen",)))
            found.append(Quantity("zero-shot", name, ("unseen",)))
        else:
            found.append(Quantity(name, name, ("seen",)))
    return found


class Comparison:
    """A results file, whole or in part.

    Args:
        results: what :mod:`examples.shapes.comparison` wrote.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.settings: dict[str, Any] = results["settings"]["sizes"]["settings"]
        self.quantities = quantities(self.settings)

    def runs(self, method: str, setting: str) -> dict[str, dict[str, Any]]:
        """The results of a method in a setting, by seed."""
        return {
            seed: groups[setting][method]
            for seed, groups in sorted(self.results["seeds"].items())
            if method in groups.get(setting, {})
        }

    def chosen_lambda(self, method: str, setting: str) -> float:
        """The lambda of the best mean accuracy on the development shapes; the first of equals."""
        runs = self.runs(method, setting).values()
        by_lambda = [run["accuracy"]["development"] for run in runs]
        return max(
            map(float, by_lambda[0]),
            key=lambda lam: math.fsum(found[f"{lam:g}"] for found in by_lambda),
        )

    def values(self, row: Row, quantity: Quantity, lam: float | None = None) -> dict[str, float]:
        """Accuracy in [0, 1] by seed.

        Args:
            row: what is asked about.
            quantity: what is asked.
            lam: the weight of CLIP, by default that of the row.
        """
        runs = self.runs(row.method, quantity.setting)
        if not runs:
            return {}
        if row.end == "chosen" and lam is None:
            lam = self.chosen_lambda(row.method, quantity.setting)
        return {seed: _read(run, quantity, lam) for seed, run in runs.items()}

    def difference(self, a: Row, b: Row, quantity: Quantity) -> Difference | None:
        """``a - b`` over the seeds that both have; None where there are none."""
        left, right = self.values(a, quantity), self.values(b, quantity)
        shared = [seed for seed in left if seed in right]
        both = [left[seed] - right[seed] for seed in shared]
        return Difference(np.array(both, dtype=np.float64)) if both else None

    def is_clear(self, a: Row, b: Row, quantity: Quantity) -> bool:
        """Whether the two differ clearly."""
        difference = self.difference(a, b, quantity)
        return difference is not None and difference.verdict != "unclear"

    def trained(self, method: str) -> list[int] | None:
        """The number of trained parameters, of each stage; None before the method was run."""
        for setting in self.settings:
            for run in self.runs(method, setting).values():
                return list(run["trained"])
        return None


def step_ratio(timing: Results, method: str, base: str = "FINE-TUNE") -> float | None:
    """The time of a step over that of another method: the median over rounds.

    Args:
        timing: what ``python -m examples.shapes.comparison --time`` wrote.
        method: whose time; None comes back for one that has no steps.
        base: over whose time.
    """
    seconds = timing["seconds"]
    if method not in seconds:
        return None
    ratios: list[float] = [a / b for a, b in zip(seconds[method], seconds[base], strict=True)]
    return median(ratios)


def _read(run: dict[str, Any], quantity: Quantity, lam: float | None) -> float:
    found = []
    for test in quantity.tests:
        by_lambda = run["accuracy"][test]
        found.append(next(iter(by_lambda.values())) if lam is None else by_lambda[f"{lam:g}"])
    return harmonic_mean(*found) if len(found) == 2 else found[0]
