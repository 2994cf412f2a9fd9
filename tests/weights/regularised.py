"""A regulariser and its second loss, for the tests of what a loop may not do."""

from __future__ import annotations

from typing import Any

from torch import nn

from openvclip import InterpolatedWeightRegularizer
from tests.helpers import Smooth, cross_entropy, snapshot


def regulariser(
    model: nn.Module, optimizer: Any = None, **settings: Any
) -> InterpolatedWeightRegularizer:
    return InterpolatedWeightRegularizer(model, optimizer, anchor=snapshot(Smooth(1)), **settings)


def second_loss(iwr: InterpolatedWeightRegularizer, model: nn.Module) -> None:
    (iwr.weight * cross_entropy(model)).backward()
