"""All merge methods, as functions of a first model and a list of two or more other models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from openvclip.merging import (
    apply_task_vectors,
    average,
    dare,
    greedy_soup,
    iso_c,
    iso_cts,
    lines,
    model_stock,
    monosoup,
    slerp,
    task_vector,
    ties,
    tsv_merge,
)

State = Mapping[str, Any]
Merge = Callable[[State, Sequence[State]], Mapping[str, Tensor]]

# Each result has the integer entries and the extra state of the first model.
MERGES: dict[str, Merge] = {
    "average": lambda first, others: average([first, *others]),
    "greedy_soup": lambda first, others: greedy_soup([first, *others], lambda _: 1.0).weights,
    "slerp": lambda first, others: slerp(others[0], first, 0.3),
    "ties": lambda first, others: ties(first, others, density=0.5),
    "ties of whole models": lambda first, others: ties(first, others, trim="model"),
    "dare": lambda first, others: dare(first, others[0], drop=0.5),
    "model_stock": model_stock,
    "lines": lambda first, others: lines(first, others, alpha=0.3, beta=0.7, blocks=2),
    "apply_task_vectors": lambda first, others: apply_task_vectors(
        first, [task_vector(first, other) for other in others], 0.5
    ),
    "monosoup": lambda first, others: monosoup(first, others[0]),
    "tsv_merge": tsv_merge,
    "iso_c": iso_c,
    "iso_cts": iso_cts,
}
