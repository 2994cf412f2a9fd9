"""TIES-Merging: trim the task vectors, elect signs, and average the values with these signs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from openvclip.errors import MergeError
from openvclip.merging.entries import (
    Models,
    combined,
    difference,
    interpolable_entries,
    matched,
    require_share,
    scale_of,
    task_vector_of,
)
from openvclip.merging.methods import SCALE, Method, Option
from openvclip.weights.interpolation import Lambda
from openvclip.weights.relative import FineTuned
from openvclip.weights.shards import whole


def ties(
    base: Mapping[str, Tensor],
    tuned: Sequence[FineTuned],
    *,
    density: float = 0.2,
    scale: Lambda = 1.0,
    trim: Literal["tensor", "model"] = "tensor",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    r"""Merge models with TIES: trim, elect signs, and average the values that have these signs.

    Yadav et al., "TIES-Merging: Resolving interference when merging models" (NeurIPS 2023), merge
    models in three steps:

    1. Trim: only the largest values of each task vector :math:`\tau_t` are kept. All other values
       become 0.
    2. Elect signs: for each weight, the elected sign is the sign of the sum of all trimmed task
       vectors, :math:`\text{sgn}(\sum_t \hat\tau_t)`.
    3. Average: the change of each weight is the mean of the values with that sign, times
       ``scale``. Zeros do not count in the mean.

    If the sum over the models is exactly 0, the weight of the original model is kept.

    Args:
        base: state dict of the original model.
        tuned: state dicts of models that were fine-tuned from the original model.
        density: share of the values of a task vector that are kept, in [0, 1]; the paper's k is
            20 %. Of n values, ``int(density * n)`` are kept, but at least one unless ``density``
            is 0. Further values that equal the smallest kept value are kept too.
        scale: the paper's lambda: a number, or a function from the canonical name of an entry to
            its number.
        trim: ``"tensor"`` keeps the largest values of each tensor, as in mergekit, and uses one
            entry at a time. ``"model"`` keeps the largest values of all tensors together, as in
            the paper's code.
        dtype: dtype of the floating-point entries of the result. Default: the narrowest dtype that
            holds the entries of all models.

    Returns:
        A new dict in the order of ``base``, on its devices, with its integer entries. Trimming
        keeps NaN and infinite changes, but the mean can drop them.

    Raises:
        MergeError: there are no models, or a setting is out of range.
        LambdaError: a scale is not a finite number.
        NonFiniteMergeError: a model holds NaN or infinity; see :mod:`openvclip.merging`.
        StateMismatchError, WeightTypeError: as in :func:`openvclip.interpolate`.
    """
    require_share(density, "density", allow_one=True)
    if trim not in ("tensor", "model"):
        raise MergeError(f"trim={trim!r}: expected 'tensor' or 'model'.")
    states = matched(base, tuned)
    model_bounds = _bounds_of_models(states, density) if trim == "model" else None

    def combine(name: str, entries: list[Tensor]) -> Tensor:
        deltas = [difference(end, entries[0]) for end in entries[1:]]
        bounds = model_bounds or [_smallest_kept([delta], density) for delta in deltas]
        for delta, bound in zip(deltas, bounds, strict=True):
            delta.masked_fill_(delta.abs() < bound, 0.0)
        return _mean_of_elected(deltas).mul_(scale_of(scale, name)).add_(entries[0])

    return combined(states, combine, dtype)


def _mean_of_elected(deltas: list[Tensor]) -> Tensor:
    elected = torch.zeros_like(deltas[0])
    for delta in deltas:
        elected += delta
    elected.sign_()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta in deltas:
        agrees = delta * elected > 0
        total += torch.where(agrees, delta, 0.0)
        count += agrees
    return total.div_(count.clamp_(min=1.0))


def _bounds_of_models(models: Models, density: float) -> list[float]:
    """Return the smallest kept magnitude of each fine-tuned model, over all its entries."""
    base, *ends = [interpolable_entries(state) for state in models]
    bounds = []
    for end, name in zip(ends, models.names[1:], strict=True):
        pair = Models([base, end], [models.names[0], name])
        vector = [whole(value) for value in task_vector_of(pair, None).values()]
        real = [torch.view_as_real(v) if v.is_complex() else v for v in vector]
        bounds.append(_smallest_kept(real, density))
    return bounds


def _smallest_kept(deltas: list[Tensor], density: float) -> float:
    """Return the trim threshold: the smallest magnitude in the top ``density`` share of all
    values."""
    magnitudes = torch.cat([delta.reshape(-1).abs().to(deltas[0].device) for delta in deltas])
    total = magnitudes.numel()
    if density == 0.0 or total == 0:
        return math.inf
    count = max(1, int(density * total))
    return float(magnitudes.kthvalue(total - count + 1).values) if count < total else 0.0


TIES = Method(
    "ties",
    "trim changes, elect signs, average values with these signs",
    "Yadav et al., NeurIPS 2023",
    ties,
    options=(
        Option(
            "density",
            "share of the values of each tensor that are kept, in [0, 1]",
            default=0.2,
            example=0.5,
        ),
        SCALE,
    ),
)
