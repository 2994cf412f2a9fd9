"""Results of the comparison that were made up: every method, several cells, plausible numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from examples.shapes.results import Results
from examples.shapes.trials.cells import QUESTIONS
from examples.shapes.trials.registry import CURVE, LAMBDAS, METHODS, TRAININGS
from examples.shapes.trials.rows import PUBLISHED
from examples.shapes.trials.settings import FULL, Sizes
from examples.shapes.trials.store import key_of
from examples.shapes.trials.tasks import RULES
from examples.shapes.trials.tuning import choose

SMALL = Sizes(train=24, test=6, development=6, stills=4, steps=2, batch_size=4, cells=1)
"""The sizes of a run that takes a second."""


@contextmanager
def tables_as_before() -> Iterator[None]:
    """Context manager after which the tables of trainings and methods are as they were before."""
    before = dict(TRAININGS), dict(METHODS)
    yield
    for table, old in zip((TRAININGS, METHODS), before, strict=True):
        table.clear()
        table.update(old)  # type: ignore[arg-type]


def made_up(cells: int = 5, seed: int = 0) -> Results:
    """Return results of all methods. Some rows are far above, or far below, all others."""
    rng = np.random.default_rng(seed)
    results: Results = {
        "settings": {"sizes": {**asdict(FULL), "cells": None}, "quick": False, "version": 1},
        "environments": [{"machine": "abacus", "torch": "0", "runs": 7}],
        "failures": {},
        "tuning": {"trainings": {}, "methods": {}},
        "cells": {},
    }
    methods = {name: METHODS[name] for name in PUBLISHED}
    # A method that is like another one comes after the rows that choose the settings.
    for name, method in sorted(methods.items(), key=lambda pair: pair[1].like is not None):
        other = METHODS[method.like or name]
        grid = TRAININGS[other.needs[0]].grid if other.needs else ({},)
        if method.like is not None:
            grid = (choose(results, methods)[method.like]["training"],)
        results["tuning"]["methods"][name] = {
            key_of(name, settings): {
                "settings": dict(settings),
                "points": [
                    _point(rng, dict(numbers), lam, 0.0, stills=False)
                    for numbers in numbers_of(name, results)
                    for lam in method.lams
                ],
                "seconds": 2.0,
            }
            for settings in grid
        }
    results["chosen"] = choose(results, methods)
    for cell in range(cells):
        entry: dict[str, Any] = {"trainings": {}, "methods": {}}
        for name, method in methods.items():
            choice = results["chosen"][name]
            more = {"Open-VCLIP": 0.1, "Vita-CLIP": -0.1, "CLIP": -0.2}.get(name, 0.0)
            lams = sorted({choice["lam"], *(CURVE if method.curve else ())})
            entry["methods"][name] = {
                "settings": choice["training"],
                "points": [
                    _point(
                        rng,
                        choice["params"],
                        lam,
                        -0.1 if (name, lam) == ("FINE-TUNE", 0) else more,
                    )
                    for lam in lams
                    for low in [-0.1 if lam == 0 else 0.0]
                ],
                "seconds": 3.0,
            }
            if method.unlabelled:
                entry["methods"][name]["unlabelled"] = {
                    question: {
                        rule: {
                            "lam": 0.3 + 0.1 * rng.random(),
                            "accuracy": 0.4 + 0.1 * rng.random(),
                        }
                        for rule in RULES
                    }
                    for question in QUESTIONS
                }
            for need in method.needs:
                entry["trainings"][key_of(need, choice["training"])] = {
                    "step_seconds": 0.1 * TRAININGS[need].passes,
                    "steps": FULL.steps,
                    "parameters": 474_049,
                    "loss": 0.1,
                    "seconds": float(20 * TRAININGS[need].passes + rng.random()),
                }
        results["cells"][str(cell)] = entry
    return results


def numbers_of(name: str, results: Results) -> Sequence[Mapping[str, Any]]:
    """Return the numbers that are tried for a method: those of the other method for a control."""
    method = METHODS[name]
    if not method.control:
        return method.params
    return [choose(results, METHODS)[str(method.like)]["params"]]


def _point(
    rng: np.random.Generator, params: dict[str, Any], lam: float, more: float, stills: bool = True
) -> dict[str, Any]:
    level = {"trained": 0.7, "shapes": 0.5, "actions": 0.3, "stills": 0.6}
    names = (*QUESTIONS, "stills") if stills else QUESTIONS
    accuracy = {name: float(level[name] + more + 0.01 * rng.normal()) for name in names}
    return {"params": params, "lam": lam, "accuracy": accuracy}


assert set(CURVE) <= set(LAMBDAS)
