"""The penalty on the distance between the trained weights and their original values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from openvclip.errors import RegularizationError
from openvclip.weights.anchor import follow_devices, take_anchor
from openvclip.weights.arguments import as_float
from openvclip.weights.names import named_parameters
from openvclip.weights.numerics import common_dtype, compute_dtype
from openvclip.weights.shards import is_sharded, local, shard_groups


class L2ToAnchor:
    r"""The penalty ``weight`` times the squared L2 distance to the original weights.

    The penalty is :math:`w \sum_i (\theta_i - \theta_{A,i})^2`, where the sum is over all elements
    of the trained parameters. Add :meth:`loss` to the loss of a step::

        l2 = openvclip.L2ToAnchor(model, weight=0.01)
        (criterion(model(x), y) + l2.loss()).backward()

    Inside :meth:`InterpolatedWeightRegularizer.step
    <openvclip.InterpolatedWeightRegularizer.step>`, the pass at the interpolated weights also has
    the penalty, at the interpolated weights.

    Source: Table 5 of Open-VCLIP; Li et al., ICML 2018 (L2-SP).

    Args:
        model: the model to train. Set ``requires_grad`` before you create the penalty.
        anchor: original weights by name, such as the state dict of the original CLIP. Default: a
            copy of the present weights.
        weight: factor of the squared distance, at least 0.
        missing: what to do with trained parameters that the anchor lacks. ``"error"`` raises an
            error, ``"skip"`` trains them without the penalty.

    Attributes:
        model: as the argument.
        weight: as the argument. It can be changed between two steps.

    Raises:
        RegularizationError: ``weight`` is negative or not finite, or ``missing`` is unknown.
        UsageError: no parameter requires gradients.
        WeightTypeError: ``model`` is not a module, or ``anchor`` not a state dict.
        StateMismatchError: the anchor lacks trained parameters, has names that the model does not
            have, or has other shapes.
    """

    def __init__(
        self,
        model: nn.Module,
        anchor: Mapping[str, Tensor] | None = None,
        *,
        weight: float,
        missing: Literal["error", "skip"] = "error",
    ) -> None:
        if not 0 <= as_float(weight) < math.inf:
            raise RegularizationError(f"weight={weight!r}: expected a finite number of at least 0.")
        if missing not in ("error", "skip"):
            raise RegularizationError(f"missing={missing!r}: expected 'error' or 'skip'.")
        self.model, self.weight = model, float(weight)
        self._anchor = take_anchor(model, anchor, missing, None)

    def loss(self) -> Tensor:
        """Return the penalty at the present weights, a scalar with gradients.

        Under ``fully_shard``, every process must call this method. The result is the penalty of the
        whole weights, and the gradients are those of the shard that each process holds.
        """
        sums: dict[tuple[Any, ...], Tensor] = {}  # by the groups of processes that hold shards
        for name, parameter in self._live().items():
            part: Any = parameter
            drift = self._drift(name, part.to_local() if is_sharded(part) else part)
            squares = (drift * drift.conj()).real if drift.is_complex() else drift.square()
            groups, total = shard_groups(parameter), squares.sum()
            sums[groups] = (
                total if groups not in sums else sums[groups] + total.to(sums[groups].device)
            )
        wholes = [_with_value_of_all(total, groups) for groups, total in sums.items()]
        return self.weight * torch.stack([x.to(wholes[0].device) for x in wholes]).sum()

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the gradients of :meth:`loss` to the gradients that the parameters have.

        This needs no graph, and memory for one parameter at a time. Call it after the backward
        pass of the step, and before the gradients are clipped. If a ``GradScaler`` scales the loss,
        unscale the gradients first. Parameters without a gradient are left as they are.
        """
        for name, parameter in self._live().items():
            if parameter.grad is not None:
                drift = self._drift(name, local(parameter))
                local(parameter.grad).add_(drift.mul_(2 * self.weight))

    def _drift(self, name: str, part: Tensor) -> Tensor:
        """Return the difference to the anchor, at least in float32: squares leave float16."""
        anchor = self._anchor[name]
        dtype = compute_dtype(common_dtype(part.dtype, anchor.dtype))
        return part.to(dtype) - anchor.to(dtype)

    def _live(self) -> dict[str, nn.Parameter]:
        parameters = named_parameters(self.model)
        live = {name: parameters[name] for name in self._anchor if name in parameters}
        follow_devices(self._anchor, live, None)
        return live


def _with_value_of_all(loss: Tensor, groups: tuple[Any, ...]) -> Tensor:
    """Return a loss with the sum of the values of all processes that hold shards."""
    whole = loss.detach().clone()
    for group in groups:
        distributed.all_reduce(whole, group=group)
    return loss + (whole - loss.detach()) if groups else loss
