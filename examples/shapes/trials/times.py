"""The time of the trainings: processor time of one thread, the median over the cells."""

from __future__ import annotations

from typing import Any

import numpy as np

from examples.shapes.results import Results
from examples.shapes.trials.registry import METHODS, REFERENCE
from examples.shapes.trials.store import key_of

__all__ = ["training_ratio"]


def training_ratio(results: Results, name: str) -> float | None:
    """Return the time of all trainings of a method relative to one run of plain fine-tuning.

    ``None`` if the method has no training, or no times. Both times are medians over the cells.
    """
    own, plain = (_seconds(results, method) for method in (name, REFERENCE))
    return float(np.median(own) / np.median(plain)) if own and plain else None


def _seconds(results: Results, name: str) -> list[float]:
    """Return the processor seconds of all trainings of a method, of each cell that has them.

    They are the seconds of whole trainings. A median of the steps would miss the longer steps of a
    method that does not do the same in all steps.
    """
    if name not in METHODS or name not in results["chosen"]:
        return []
    settings = results["chosen"][name]["training"]
    keys = [key_of(need, settings) for need in METHODS[name].needs]
    found = []
    for entry in results["cells"].values():
        trainings: dict[str, Any] = entry.get("trainings", {})
        if keys and all(key in trainings for key in keys):
            found.append(sum(float(trainings[key]["seconds"]) for key in keys))
    return found
