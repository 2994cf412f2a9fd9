"""Errors for weights without values, and for logits and features that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from openvclip.errors import EvaluationError, NonFiniteWeightsError, UsageError, listed
from openvclip.weights.numerics import non_finite_names
from openvclip.weights.shards import local


def require_values(model: nn.Module) -> None:
    """Check that no parameter of a model is on the meta device, which holds no values.

    Accelerate keeps the weights that it offloads there, and loads them when they are used. Such
    models pass.

    Raises:
        UsageError: a parameter is on the meta device. The error names the first of them.
    """
    if not any(value.is_meta for value in model.parameters()):
        return
    names = [name for name, value in model.named_parameters() if value.is_meta]
    if not any(hasattr(part, "_hf_hook") for part in model.modules()):
        raise UsageError(
            f"The model has no values in {len(names)} weights, which are on the meta device "
            f"({listed(names)}). Call model.to_empty(device='cpu') and load the weights, or create "
            "the model outside of torch.device('meta')."
        )


def require_finite(values: Tensor, weights: Callable[[], Mapping[str, Tensor]], what: str) -> None:
    """Raise an error if values that a model computed are NaN or infinite.

    If all weights are finite, minus infinity is allowed: a classifier can rule out classes with
    such logits.

    Args:
        values: the logits or features.
        weights: returns the state dict of the model. It is called if ``values`` are not finite.
        what: name of the values at the start of the error text.

    Raises:
        NonFiniteWeightsError: ``values`` and some weights are not finite. The error names the
            first of these weights.
        EvaluationError: ``values`` hold NaN or infinity, and all weights are finite.
    """
    if bool(torch.isfinite(values).all()):
        return
    # Each process names the entries of its own shards, because the others may not come here.
    names = non_finite_names({name: local(value) for name, value in weights().items()})
    if names:
        raise NonFiniteWeightsError(
            f"{what} are NaN or infinite, and so are entries of the weights ({len(names)}): "
            f"{listed(names)}. Use another file of weights, or an earlier checkpoint of the run."
        )
    if not bool(torch.isneginf(values).logical_or(torch.isfinite(values)).all()):
        raise EvaluationError(
            f"{what} are NaN or infinite, although all weights are finite. Check that the input "
            "holds no NaN. If the model runs in float16, use bfloat16 or float32: large values "
            "overflow in float16."
        )
