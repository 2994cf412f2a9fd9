"""Optimizers that keep other weights for training than for evaluation (schedule-free)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from openvclip.errors import OptimizerModeWarning

_SEEN: WeakSet[Optimizer] = WeakSet()
_hooks: list[Any] = []


def watch_optimizers() -> None:
    """Look at each optimizer that steps from now on. One call has the effect of several."""
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_look))


def _look(optimizer: Optimizer, *_: object) -> None:
    if torch.compiler.is_compiling():
        return
    if any("train_mode" in group for group in optimizer.param_groups):
        _SEEN.add(optimizer)


def warn_of_training_weights(parameters: Iterable[Tensor]) -> None:
    """Warn if a schedule-free optimizer holds its training weights in one of the parameters.

    Such an optimizer has ``train()`` and ``eval()``, and a flag ``train_mode`` in its groups.

    Args:
        parameters: the parameters of a model.

    Warns:
        OptimizerModeWarning: the optimizer has to be asked for the weights for evaluation.
    """
    if not _SEEN:
        return
    ours = {id(parameter) for parameter in parameters}
    for optimizer in _SEEN:
        for group in optimizer.param_groups:
            if group.get("train_mode") is True and any(id(p) in ours for p in group["params"]):
                warnings.warn(
                    f"{type(optimizer).__name__} is in training mode, so training weights enter "
                    "the average, and not the weights for evaluation. Call optimizer.eval() before "
                    "update(model), and optimizer.train() after it.",
                    OptimizerModeWarning,
                    stacklevel=5,
                )
                return
