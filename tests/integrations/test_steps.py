"""Steps and alphas are counted as loops need them, also for fused optimizers and resumed steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from openvclip import InterpolatedWeightRegularizer
from openvclip.integrations.steps import InterpolatedPasses, StepCounter
from tests.integrations.by_hand import network, regularizer


@pytest.mark.parametrize(("skips", "stepped"), [(0.0, True), (1.0, False)])
def test_a_step_that_a_fused_optimizer_skips_is_not_counted(skips: float, stepped: bool) -> None:
    model = network(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    counter = StepCounter([optimizer])
    model(torch.ones(1, 4)).sum().backward()
    optimizer.found_inf = torch.tensor(skips)  # type: ignore[attr-defined]  # as a GradScaler does
    optimizer.step()
    assert (counter.waits, counter.take(), counter.take()) == (stepped, stepped, False)


def alpha_of(passes: InterpolatedPasses, step: int, model: nn.Module) -> float:
    with passes.interpolated(step, model) as alpha:
        return alpha


def test_a_step_that_is_resumed_in_its_middle_keeps_its_alpha() -> None:
    model = network()
    passes, resumed = (InterpolatedPasses(regularizer(model)) for _ in range(2))
    first, second = (alpha_of(passes, step, model) for step in (0, 1))
    assert first != second
    assert alpha_of(passes, 1, model) == second  # the next micro-batch
    resumed.load_state_dict(passes.state_dict())
    assert alpha_of(resumed, 1, model) == second
    assert alpha_of(resumed, 2, model) == alpha_of(passes, 2, model)


def test_a_weight_of_0_needs_no_second_pass() -> None:
    model = network()
    passes = InterpolatedPasses(InterpolatedWeightRegularizer(model, weight=0.0))
    assert not passes.is_due(0)
    passes = InterpolatedPasses(InterpolatedWeightRegularizer(model, every=3))
    assert [passes.is_due(step) for step in range(4)] == [True, False, False, True]
