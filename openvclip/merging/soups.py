"""Means of fine-tuned models: the uniform soup and the greedy soup."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsFloat

import torch
from torch import Tensor

from openvclip.errors import MergeError
from openvclip.merging.entries import (
    combined,
    in_pieces,
    interpolable_entries,
    matched,
    require_same_infinities_in,
)
from openvclip.merging.methods import Method
from openvclip.weights.finite import require_finite
from openvclip.weights.names import require_mapping
from openvclip.weights.numerics import non_finite_names


def average(
    models: Sequence[Mapping[str, Tensor]], *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the mean of the models (uniform soup).

    Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
    accuracy without increasing inference time" (ICML 2022).

    Args:
        models: one or more state dicts with the same names and shapes. An
            :class:`~openvclip.weights.Adapter` after the first model is a fine-tune of the first
            model; merge adapters of another base model first.
        dtype: dtype of the floating-point entries of the result. Default: the narrowest dtype that
            holds the entries of all models.

    Returns:
        A new dict in the order of the first model, on its devices, with its integer entries. Sums
        are computed in float64 and rounded once, so the mean of equal models is bitwise that model.

    Raises:
        MergeError: there are no models.
        NonFiniteMergeError: a model holds NaN or infinity; see :mod:`openvclip.merging`.
        StateMismatchError, WeightTypeError: as in :func:`openvclip.interpolate`.
    """
    _require_models(models, "average")
    states = matched(models[0], models, "models[0]", "models[{}]")[1:]
    return combined(states, _mean, dtype)


def _mean(name: str, entries: list[Tensor]) -> Tensor:
    result = torch.empty(entries[0].shape, dtype=torch.float64, device=entries[0].device)
    addend = result.new_empty(0)
    for piece, *parts in in_pieces([result, *entries]):
        addend = addend if len(addend) >= len(piece) else torch.empty_like(piece)
        piece.copy_(parts[0])
        for part in parts[1:]:  # twice as fast as adding a tensor of another dtype
            piece += addend[: len(part)].copy_(part)
        piece /= len(entries)
        require_finite(name, piece, parts)
    return result


@dataclass(frozen=True)
class GreedySoup:
    """Result of :func:`greedy_soup`.

    Attributes:
        weights: state dict of the soup.
        ingredients: positions of the models in the soup, in the order in which they were added.
        score: score of the soup.
        scores: score of each single model, in the order of ``models``.
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
    """Add models to a mean, best model first, and keep each model that does not lower the score.

    Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves
    accuracy without increasing inference time" (ICML 2022): the models are sorted by their score on
    held-out data, and the best model is the first ingredient. Each further model becomes an
    ingredient if the mean with this model scores at least as well as the mean without it. The soup
    therefore scores at least as well as the best model on the held-out data. Report the accuracy
    on other data.

    Args:
        models: one or more state dicts with the same names and shapes.
        evaluate: function from a state dict to its score on held-out data; higher is better. It is
            called ``2 n - 1`` times for ``n`` models and must not change the state dict.
        dtype: dtype of the floating-point entries of the soup, as in :func:`average`.

    Returns:
        The soup, its ingredients and the scores. Models with equal scores keep their order. A soup
        of one ingredient is a copy of that model.

    Raises:
        MergeError: there are no models, or a score is not a finite number.
        NonFiniteMergeError: a model holds NaN or infinity. No model is evaluated then.
        StateMismatchError, WeightTypeError: as in :func:`openvclip.interpolate`.
    """
    _require_models(models, "greedy_soup")
    for i, model in enumerate(models):
        require_mapping(model, f"models[{i}]")
    # Both checks fail before a long evaluation.
    states = matched(models[0], models, "models[0]", "models[{}]")[1:]
    broken = [name for state in states for name in non_finite_names(interpolable_entries(state))]
    require_same_infinities_in(states, broken)
    scores = [_score(evaluate, model, f"models[{i}]") for i, model in enumerate(models)]
    order = sorted(range(len(models)), key=lambda i: -scores[i])
    ingredients, best = order[:1], scores[order[0]]
    weights = average([models[order[0]]], dtype=dtype)
    for position in order[1:]:
        candidate = [*ingredients, position]
        soup = average([models[i] for i in candidate], dtype=dtype)
        score = _score(evaluate, soup, f"the mean of models {candidate}")
        if score >= best:
            ingredients, best, weights = candidate, score, soup
    return GreedySoup(weights, tuple(ingredients), best, tuple(scores))


def _require_models(models: object, function: str) -> None:
    if not isinstance(models, Sequence) or not models:
        raise MergeError(f"{function}: expected a list of one or more state dicts.")


def _score(
    evaluate: Callable[[Mapping[str, Tensor]], SupportsFloat],
    weights: Mapping[str, Tensor],
    what: str,
) -> float:
    score = float(evaluate(weights))
    if not math.isfinite(score):
        raise MergeError(
            f"evaluate returned {score} for {what}; expected a finite number (higher is better)."
        )
    return score


AVERAGE = Method(
    "average",
    "the mean of the models (uniform soup)",
    "Wortsman et al., ICML 2022",
    average,
    base=False,
)
