"""All merge methods, as functions of a first model and a list of two or more other models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from openvclip.merging import METHODS, apply_task_vectors, greedy_soup, task_vector, ties

State = Mapping[str, Any]
Merge = Callable[[State, Sequence[State]], Mapping[str, Tensor]]

# These two copy integers and extra state from the fine-tuned model.
_OF_THE_MODEL = {"interpolate", "slerp"}


def _by_name(name: str) -> Merge:
    method = METHODS[name]

    def merge(first: State, others: Sequence[State]) -> Mapping[str, Tensor]:
        settings = method.example()
        if name in _OF_THE_MODEL:
            return method.run(others[0], [first], **settings)
        if not method.base:
            return method.run(None, [first, *others], **settings)
        return method.run(first, others[:1] if method.most == 1 else others, **settings)

    return merge


# Each result has the integer entries and the extra state of the first model.
MERGES: dict[str, Merge] = {
    **{name: _by_name(name) for name in METHODS},
    "greedy_soup": lambda first, others: greedy_soup([first, *others], lambda _: 1.0).weights,
    "ties of whole models": lambda first, others: ties(first, others, trim="model"),
    "apply_task_vectors": lambda first, others: apply_task_vectors(
        first, [task_vector(first, other) for other in others], 0.5
    ),
}
