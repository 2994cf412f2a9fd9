"""What the pages read from the results: complete cells, chosen settings, accuracies by cell."""

from __future__ import annotations

from statistics import fmean
from typing import Any, Literal, get_args

from examples.shapes.results import Results
from examples.shapes.trials.cells import QUESTIONS, Question
from examples.shapes.trials.registry import CURVE, METHODS
from examples.shapes.trials.store import Choice
from examples.shapes.trials.tuning import has_points

__all__ = ["MEAN", "OUTCOMES", "Outcome", "accuracies", "complete", "lambda_of"]

Mean = Literal["mean"]
Outcome = Question | Mean
MEAN: Mean = "mean"
"""The name of the mean of the three questions, by which the settings are chosen."""

OUTCOMES: tuple[Outcome, ...] = (*QUESTIONS, *get_args(Mean))


def complete(results: Results) -> Results:
    """Return the results with those cells alone that enter the pages.

    A cell is complete if it has every row at its chosen settings. The cells 2 k and 2 k + 1 are a
    pair: each trains the actions that the other one asks for. Both cells of a pair enter the
    pages, or none. If no pair is complete, all complete cells enter. A method without a row in any
    cell is left out.
    """
    chosen: dict[str, Choice] = results["chosen"]
    rows = {
        number: {name for name in chosen if _has_row(entry, name, chosen[name])}
        for number, entry in results["cells"].items()
    }
    known = set().union(*rows.values())
    whole = sorted((number for number, names in rows.items() if names == known != set()), key=int)
    in_pairs = [number for number in whole if str(int(number) ^ 1) in whole]
    return {
        **results,
        "chosen": {name: choice for name, choice in chosen.items() if name in known},
        "cells": {number: results["cells"][number] for number in in_pairs or whole},
    }


def _has_row(entry: dict[str, Any], name: str, choice: Choice) -> bool:
    row, method = entry.get("methods", {}).get(name), METHODS.get(name)
    lams = {choice["lam"], *(CURVE if method and method.curve else ())}
    if row is None or not has_points(row, choice["training"], [choice["params"]], lams):
        return False
    return "unlabelled" in row or not (method and method.unlabelled)


def lambda_of(results: Results, method: str, lam: float | None) -> float:
    """Return a λ, or the chosen λ of a method if ``lam`` is ``None``."""
    return float(results["chosen"][method]["lam"] if lam is None else lam)


def accuracies(results: Results, method: str, lam: float | None, name: str) -> dict[str, float]:
    """Return the accuracies in [0, 1] of a method, by the number of the cell.

    Args:
        results: the results. Rows of other settings than the chosen settings are left out.
        method: name of the method.
        lam: the λ; ``None`` is the chosen λ.
        name: a question, ``"stills"``, or ``"mean"``: the mean of the three questions.
    """
    choice = results["chosen"].get(method)
    if choice is None:
        return {}
    wanted = lambda_of(results, method, lam)
    values = {}
    for number, entry in results["cells"].items():
        row = entry.get("methods", {}).get(method)
        if row is None or row["settings"] != choice["training"]:
            continue
        for point in row["points"]:
            if point["lam"] == wanted and point["params"] == choice["params"]:
                found = point["accuracy"]
                values[number] = (
                    fmean(found[question] for question in QUESTIONS)
                    if name == MEAN
                    else float(found[name])
                )
    return values
