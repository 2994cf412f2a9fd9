"""The tables of the comparison: rows, columns, and differences paired by seed."""

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
    """A row of the tables: a method at its last weights, or at the chosen lambda."""

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
    """A column of the tables: the accuracy on a test list, or the harmonic mean of two lists."""

    label: str
    setting: str
    tests: tuple[str, ...]


def harmonic_mean(base: float, novel: float) -> float:
    """Return ``2 / (1 / base + 1 / novel)``, or 0 if one of the two accuracies is 0."""
    return 0.0 if base == 0 or novel == 0 else 2 / (1 / base + 1 / novel)


def quantities(settings: dict[str, Any]) -> list[Quantity]:
    """Return the columns of the tables, from the settings of a results file."""
    columns = []
    for name, setting in settings.items():
        if setting["base"]:
            columns += [Quantity(test, name, (test,)) for test in ("base", "novel")]
            columns.append(Quantity("harmonic mean", name, ("base", "novel")))
        elif "unseen" in setting["tests"]:
            columns.append(Quantity("closed set", name, ("seen",)))
            columns.append(Quantity("zero-shot", name, ("unseen",)))
        else:
            columns.append(Quantity(name, name, ("seen",)))
    return columns


class Comparison:
    """The accuracies of a results file, which may be incomplete.

    Args:
        results: the content of the file that :mod:`examples.shapes.comparison` wrote.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.settings: dict[str, Any] = results["settings"]["sizes"]["settings"]
        self.quantities = quantities(self.settings)

    def runs(self, method: str, setting: str) -> dict[str, dict[str, Any]]:
        """Return the results of a method in a setting, by seed."""
        return {
            seed: groups[setting][method]
            for seed, groups in sorted(self.results["seeds"].items())
            if method in groups.get(setting, {})
        }

    def chosen_lambda(self, method: str, setting: str) -> float:
        """Return the lambda with the best mean accuracy on the development shapes.

        If several lambdas have this mean, the first of them in the results file is returned.
        """
        runs = self.runs(method, setting).values()
        by_lambda = [run["accuracy"]["development"] for run in runs]
        return max(
            map(float, by_lambda[0]),
            key=lambda lam: math.fsum(accuracies[f"{lam:g}"] for accuracies in by_lambda),
        )

    def values(self, row: Row, quantity: Quantity, lam: float | None = None) -> dict[str, float]:
        """Return the accuracies of a row in [0, 1], by seed.

        Args:
            row: the row of the table.
            quantity: the column of the table.
            lam: the weight of CLIP. Default: the lambda of the row.
        """
        runs = self.runs(row.method, quantity.setting)
        if not runs:
            return {}
        if row.end == "chosen" and lam is None:
            lam = self.chosen_lambda(row.method, quantity.setting)
        return {seed: _read(run, quantity, lam) for seed, run in runs.items()}

    def difference(self, a: Row, b: Row, quantity: Quantity) -> Difference | None:
        """Return ``a - b`` for the seeds that both rows have, or ``None`` without such seeds."""
        left, right = self.values(a, quantity), self.values(b, quantity)
        shared = [seed for seed in left if seed in right]
        both = [left[seed] - right[seed] for seed in shared]
        return Difference(np.array(both, dtype=np.float64)) if both else None

    def is_clear(self, a: Row, b: Row, quantity: Quantity) -> bool:
        """Return whether the difference of two rows is clear."""
        difference = self.difference(a, b, quantity)
        return difference is not None and difference.verdict != "unclear"

    def trained(self, method: str) -> list[int] | None:
        """Return the number of trained parameters of each stage, or ``None`` without a run."""
        for setting in self.settings:
            for run in self.runs(method, setting).values():
                return list(run["trained"])
        return None


def step_ratio(timing: Results, method: str, base: str = "FINE-TUNE") -> float | None:
    """Return the time of a step relative to another method: the median of the ratios.

    Args:
        timing: the content of the file of ``python -m examples.shapes.comparison --time``.
        method: the method. The result is ``None`` for a method without training steps.
        base: the method with the relative time 1.
    """
    seconds = timing["seconds"]
    if method not in seconds:
        return None
    ratios: list[float] = [a / b for a, b in zip(seconds[method], seconds[base], strict=True)]
    return median(ratios)


def _read(run: dict[str, Any], quantity: Quantity, lam: float | None) -> float:
    accuracies = []
    for test in quantity.tests:
        by_lambda = run["accuracy"][test]
        accuracies.append(next(iter(by_lambda.values())) if lam is None else by_lambda[f"{lam:g}"])
    return harmonic_mean(*accuracies) if len(accuracies) == 2 else accuracies[0]
