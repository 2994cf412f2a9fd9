"""Checks of the settings, the optimizer, the losses and the states that a regulariser accepts."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from openvclip.errors import (
    LossError,
    RegularizationError,
    StateMismatchError,
    UsageError,
    WeightTypeError,
    listed,
)
from openvclip.weights.anchor import trained_parameters
from openvclip.weights.arguments import as_float, is_whole, require_own_keys


def require_settings(
    interval: tuple[float, float], weight: float, share: float, every: int, missing: str
) -> None:
    """Raise a :class:`RegularizationError` if a setting is out of range."""
    if not _is_interval(interval):
        raise RegularizationError(
            f"interval={interval!r}: expected (low, high) with 0 <= low <= high <= 1. alpha is the "
            "weight of the anchor (the original CLIP); the paper uses (0.0, 0.6)."
        )
    if not 0 <= as_float(weight) < math.inf:
        raise RegularizationError(f"weight={weight!r}: expected C of Equation 9, a number >= 0.")
    if not 0 < as_float(share) <= 1:
        raise RegularizationError(
            f"share={share!r}: expected a number in (0, 1], the share of the clips of a batch on "
            "which the interpolated pass runs."
        )
    if not is_whole(every, 1):
        raise RegularizationError(f"every={every!r}: expected a whole number of steps >= 1.")
    if missing not in ("error", "skip"):
        raise RegularizationError(f"missing={missing!r}: expected 'error' or 'skip'.")


def require_wrapper(wrapper: object) -> None:
    """Raise a :class:`WeightTypeError` if ``wrapper`` is neither a module nor ``None``."""
    if wrapper is not None and not isinstance(wrapper, nn.Module):
        raise WeightTypeError(
            "wrapper: expected the module that the closure calls or None, got a "
            f"{type(wrapper).__name__}."
        )


def require_alpha(alpha: float) -> None:
    """Raise a :class:`RegularizationError` if alpha is not in [0, 1]."""
    if not _is_interval((alpha, alpha)):
        raise RegularizationError(
            f"alpha={alpha!r}: expected a number in [0, 1], the weight of the anchor (the original "
            "CLIP)."
        )


def _is_interval(interval: Any) -> bool:
    try:
        low, high = interval
        return 0.0 <= as_float(low) <= as_float(high) <= 1.0
    except (TypeError, ValueError):
        return False


def require_own_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise a :class:`UsageError` if the optimizer holds no trained parameter of the model."""
    if not hasattr(optimizer, "param_groups"):
        raise UsageError(
            f"optimizer: expected an optimizer of torch.optim or None, got a "
            f"{type(optimizer).__name__}. Pass other arguments by name."
        )
    trained = {id(p) for p in trained_parameters(model).values()}
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not trained & optimized:
        raise UsageError(
            "The optimizer holds none of the model's trained parameters. Create the optimizer for "
            "this model, after the model was copied or moved."
        )


def require_known(trained: Mapping[str, nn.Parameter], known: Collection[str]) -> None:
    """Raise a :class:`UsageError` if parameters are trained that were frozen before.

    Args:
        trained: the parameters that require gradients now.
        known: the names of those that required gradients when the regulariser was created.
    """
    unknown = [n for n in trained if n not in known]
    if unknown:
        raise UsageError(
            f"{len(unknown)} parameters require gradients now but were frozen when the "
            f"regulariser was created ({listed(unknown)}). Create the regulariser after the "
            "last change of requires_grad, with the original weights as anchor."
        )


def require_state(state: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise an error if a saved state does not belong to this regulariser.

    Args:
        state: the saved state.
        current: the present state of the regulariser.

    Raises:
        StateMismatchError: an entry is missing or unknown, a setting is out of range, or the
            anchors differ.
    """
    require_own_keys(state, current.keys(), "an InterpolatedWeightRegularizer")
    try:
        require_settings(
            state["interval"], state["weight"], state["share"], state["every"], "error"
        )
    except RegularizationError as error:
        raise StateMismatchError(f"A setting of the state is out of range: {error}") from error
    if not is_whole(state["steps"], 0):
        raise StateMismatchError(
            f"The entry 'steps' of the state is {state['steps']!r}; expected a number of steps."
        )
    if state["anchor_fingerprint"] != current["anchor_fingerprint"]:
        raise StateMismatchError(
            "The anchor differs from the anchor of the saved run. Create the regulariser with "
            "anchor=<state dict of the original CLIP>, or before the fine-tuned weights are "
            "loaded into the model. The same parameters must require gradients in both runs."
        )


def require_loss(loss: object) -> Tensor:
    """Return the loss, or raise a :class:`LossError` if it is not a scalar with a graph."""
    if not isinstance(loss, Tensor):
        raise LossError(
            f"The closure returned {type(loss).__name__}; expected the loss, a scalar tensor. The "
            "closure must run the forward pass and return the loss without calling backward()."
        )
    if loss.numel() != 1:
        raise LossError(
            f"The closure returned a tensor of shape {list(loss.shape)}; expected a scalar loss. "
            "Reduce it, for example with .mean()."
        )
    if not loss.requires_grad:
        raise LossError(
            "The loss has no graph because it does not require gradients. Compute the loss from "
            "the output of the model with gradients enabled, without torch.no_grad(), .detach() "
            "and .item()."
        )
    return loss
