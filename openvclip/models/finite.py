"""Errors for logits and features that are not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from openvclip.errors import EvaluationError, NonFiniteWeightsError
from openvclip.weights.names import listed
from openvclip.weights.numerics import non_finite_names


def require_finite(values: Tensor, state: Mapping[str, Tensor], what: str) -> None:
    """Raise an error if values that a model computed are NaN or infinite.

    Args:
        values: the logits or features.
        state: the weights of the model, which are read only if ``values`` are not finite.
        what: name of the values at the start of the error text.

    Raises:
        NonFiniteWeightsError: ``values`` and some weights are not finite. The error names the
            first of these weights.
        EvaluationError: ``values`` are not finite, and all weights are finite.
    """
    if bool(torch.isfinite(values).all()):
        return
    names = non_finite_names(state)
    if names:
        raise NonFiniteWeightsError(
            f"{what} are NaN or infinite, because {len(names)} entries of the weights are: "
            f"{listed(names)}. Use another file of weights, or an earlier checkpoint of the run."
        )
    raise EvaluationError(
        f"{what} are NaN or infinite, although all weights are finite. Check that the input holds "
        "no NaN. If the model runs in float16, use bfloat16 or float32: large values overflow in "
        "float16."
    )
