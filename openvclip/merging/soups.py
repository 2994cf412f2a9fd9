"""Means of fine-tuned models: the uniform soup and the greedy soup."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsFloat

import torch
from torch import Tensor

from openvclip.errors import MergeError
from openvclip.merging.entries import combined, matched


def average(
    models: Sequence[Mapping[str, Tensor]], *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The mean of the models: the uniform soup of Wortsman et al., "Model soups" (ICML 2022).

    Args:
        models: one or more state dicts with the same names and shapes.
        dtype: dtype of the floating-point entries of the result; by default the narrowest that
            holds those of all models.

    Returns:
        A new dict in the order of the first model, on its devices, with its integer entries. The
        sums are in float64 and rounded once, so the mean of equal models is bitwise that model.

    Raises:
        MergeError: there are no models.
        StateMismatchError, WeightTypeError: as in ``interpolate``.
    """
    if not isinstance(models, Sequence) or not models:
        raise MergeError("average: expected a list of one or more state dicts.")
    states = matched(models[0], models, "models[0]", "models[{}]")[1:]

    def combine(_: str, entries: list[Tensor]) -> Tensor:
        total = entries[0].double()
        for entry in entries[1:]:
            total = total + entry
        return total / len(entries)

    return combined(states, combine, dtype)


@dataclass(frozen=True)
class GreedySoup:
    """What :func:`greedy_soup` found.

    Attributes:
        weights: state dict of the soup.
        ingredients: positions of the models in it, in the order in which they were added.
        score: the soup's own score.
        scores: score of each model by itself, in the order in which they were given.
    """

    weights: dict[str, Tensor]
    ingredients: tuple[int, ...]
    score: float
    scores: tuple[float, ...]


def greedy_soup(
    models: Sequence[Mapping[str, Tensor]],
    evaluate: Callable[[Mapping[str, Tensor]], SupportsFloat],
    *,
    dtype: torch.dtype | None = None,
) -> GreedySoup:
    """The greedy soup: models are added, best first, while the mean does not get worse.

    Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
    accuracy without increasing inference time" (ICML 2022): the models are sorted by their score on
    held-out data, the best is the first ingredient, and each further one stays where the mean of
    all ingredients with it scores at least as well as the soup without it. So the soup is never
    worse than the best model on the data that it was chosen by; report other data.

    Args:
        models: one or more state dicts with the same names and shapes.
        evaluate: from a state dict to its score on held-out data, of which more is better. It is
            called ``2 n - 1`` times for ``n`` models, and must not change what it is given.
        dtype: dtype of the floating-point entries of the soup, as in :func:`average`.

    Returns:
        The soup, what is in it and the scores. Models with equal scores keep their order. A soup
        of one ingredient is that model, in memory of its own.

    Raises:
        MergeError: there are no models, or a score is not a finite number.
        StateMismatchError, WeightTypeError: as in ``interpolate``.
    """
    if not isinstance(models, Sequence) or not models:
        raise MergeError("greedy_soup: expected a list of one or more state dicts.")
    matched(models[0], models, "models[0]", "models[{}]")  # before hours of evaluation
    scores = [_score(evaluate, model, f"models[{i}]") for i, model in enumerate(models)]
    order = sorted(range(len(models)), key=lambda i: -scores[i])
    ingredients, best = order[:1], scores[order[0]]
    weights = average([models[order[0]]], dtype=dtype)
    for candidate in order[1:]:
        tried = [*ingredients, candidate]
        soup = average([models[i] for i in tried], dtype=dtype)
        score = _score(evaluate, soup, f"the mean of models {tried}")
        if score >= best:
            ingredients, best, weights = tried, score, soup
    return GreedySoup(weights, tuple(ingredients), best, tuple(scores))


def _score(
    evaluate: Callable[[Mapping[str, Tensor]], SupportsFloat],
    weights: Mapping[str, Tensor],
    what: str,
) -> float:
    score = float(evaluate(weights))
    if not math.isfinite(score):
        raise MergeError(
            f"evaluate gave {score} for {what}; expected a finite number, of which more is better."
        )
    return score
