"""What each method trains, with what optimizer."""

from __future__ import annotations

import dataclasses

from torch import nn

from openvclip.training.methods import make_optimizer
from tests.examples.finetune_reference import TINY


def test_weights_of_one_axis_decay_on_their_own() -> None:
    recipe = dataclasses.replace(TINY, weight_decay=0.3, weight_decay_1d=0.1)
    layer = nn.Linear(2, 2)
    groups = make_optimizer(list(layer.parameters()), recipe).param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert (decays[id(layer.weight)], decays[id(layer.bias)]) == (0.3, 0.1)
