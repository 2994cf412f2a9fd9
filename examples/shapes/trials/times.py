"""The time of the trainings."""

from __future__ import annotations

from typing import Any

import numpy as np

from examples.shapes.results import Results
from examples.shapes.trials.claims import REFERENCE
from examples.shapes.trials.registry import METHODS

__all__ = ["step_ratio"]


def step_ratio(results: Results, name: str) -> float | None:
    """Return the time of the training relative to one run of plain fine-tuning, or ``None``."""
    ratios = []
    for entry in results["cells"].values():
        own = _training_seconds(results, entry, name)
        plain = _training_seconds(results, entry, REFERENCE)
        if own is not None and plain:
            ratios.append(own / plain)
    return float(np.median(ratios)) if ratios else None


def _training_seconds(results: Results, entry: dict[str, Any], name: str) -> float | None:
    """Return the seconds of all training steps of a method in a cell."""
    row = entry["methods"].get(name)
    if row is None or name not in METHODS or not METHODS[name].needs:
        return None
    settings = " ".join(f"{key}={value}" for key, value in sorted(row["settings"].items()))
    seconds = 0.0
    for need in METHODS[name].needs:
        training = entry["trainings"].get(f"{need} {settings}".strip())
        if training is None or training["step_seconds"] is None:
            return None
        seconds += training["step_seconds"] * training["steps"]
    return seconds
