"""Gradients that step() would clear are noticed, and accumulation around step() works."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from openvclip.errors import UsageError
from tests.helpers import (
    Smooth,
    assert_same_state,
    cross_entropy,
    gradients,
    same_bits,
    snapshot,
)
from tests.weights.regularised import regulariser

# --- report 07: gradients that step() would clear ------------------------------------------------


@pytest.fixture
def accelerate() -> Iterator[Any]:
    """The library accelerate, without the settings of other tests."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_accelerates_accumulate_around_step_equals_a_loop_by_hand(
    number: int, clip: float | None, accelerate: Any, device: torch.device
) -> None:
    # Report 07 (accelerate#1299): each micro-batch cleared the gradients of the one before.
    models = []
    for framework in (True, False):
        model = Smooth()
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        if framework:
            on_cpu = device.type == "cpu"
            accelerator = accelerate.Accelerator(gradient_accumulation_steps=number, cpu=on_cpu)
            accelerator.prepare(model)
            wrapped: Any = accelerator.prepare(optimizer)
            iwr = regulariser(model, wrapped)
            for micro in range(3 * number):
                before = snapshot(model)
                with accelerator.accumulate(model):
                    iwr.step(
                        lambda net=model, micro=micro: cross_entropy(net, micro),  # type: ignore[misc]
                        backward=accelerator.backward,
                        max_grad_norm=clip,
                    )
                ends = micro % number == number - 1
                assert same_bits(before["scale"], model.scale) != ends
        else:
            iwr = regulariser(model)
            for step in range(3):
                optimizer.zero_grad()
                for micro in range(number * step, number * (step + 1)):
                    with iwr.interpolated():
                        (iwr.weight * cross_entropy(model, micro) / number).backward()
                    (cross_entropy(model, micro) / number).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
        models.append(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_gradients_of_the_loop_are_not_cleared_without_a_word() -> None:
    # Report 07 (accelerate#1299): accumulation by hand around step().
    model = Smooth()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    iwr = regulariser(model, optimizer)
    for _ in range(2):
        cross_entropy(model, 1).backward()
        held, before = gradients(model), snapshot(model)
        with pytest.raises(UsageError, match=r"has not used.*interpolated.*zero_grad"):
            iwr.step(lambda: cross_entropy(model, 2))
        assert_same_state(model.state_dict(), before)
        assert all(same_bits(value, held[name]) for name, value in gradients(model).items())
        optimizer.zero_grad()
        iwr.step(lambda: cross_entropy(model, 2))  # its own gradients stay, and were used


def test_gradients_added_to_those_of_a_step_are_noticed() -> None:
    model = Smooth()
    iwr = regulariser(model, torch.optim.SGD(model.parameters(), lr=0.1))
    iwr.step(lambda: cross_entropy(model))
    cross_entropy(model, 1).backward()
    with pytest.raises(UsageError, match="has not used"):
        iwr.step(lambda: cross_entropy(model))


def test_a_step_that_a_wrapper_leaves_out_loses_nothing() -> None:
    """A wrapper that steps in every second call, of which nothing is known."""
    model = Smooth()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)

    class EverySecond:
        def __init__(self) -> None:
            self.optimizer, self.calls = inner, 0
            self.param_groups, self.zero_grad = inner.param_groups, inner.zero_grad

        def step(self) -> None:
            self.calls += 1
            if self.calls % 2 == 0:
                inner.step()

    iwr = regulariser(model, EverySecond())
    iwr.step(lambda: cross_entropy(model))
    with pytest.raises(UsageError, match="has not used"):
        iwr.step(lambda: cross_entropy(model))


LOOPS: dict[str, Callable[[nn.Module, torch.optim.Optimizer], object]] = {
    "a plain step before": lambda m, o: (cross_entropy(m).backward(), o.step()),
    "gradients of zero": lambda m, o: (cross_entropy(m).backward(), o.zero_grad(False)),
    "nothing": lambda m, o: None,
}


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_were_used_or_are_zero_are_cleared(kind: str, fused: bool) -> None:
    model, expected = Smooth(), Smooth()
    for net in (model, expected):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, fused=fused)
        iwr = regulariser(net, optimizer)
        for step in range(3):
            LOOPS[kind](net, optimizer)
            if net is expected:
                optimizer.zero_grad()
            iwr.step(lambda step=step: cross_entropy(net, step))  # type: ignore[misc]  # noqa: B023
    assert_same_state(model.state_dict(), expected.state_dict())


def test_gradients_from_before_the_regulariser_are_cleared() -> None:
    """A warm-up loop often leaves its last gradients."""
    model = Smooth()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cross_entropy(model).backward()
    optimizer.step()
    regulariser(model, optimizer).step(lambda: cross_entropy(model))


def test_a_copy_and_a_pickle_of_a_regulariser_work_on_their_own_optimizer() -> None:
    model = Smooth()
    iwr = regulariser(model, torch.optim.SGD(model.parameters(), lr=0.1))
    iwr.step(lambda: cross_entropy(model))
    for other in (copy.deepcopy(iwr), pickle.loads(pickle.dumps(iwr))):
        assert not any(isinstance(value, torch.Generator) for value in iwr.__getstate__().values())
        assert torch.equal(other.state_dict()["generator"], iwr.state_dict()["generator"])
        before = snapshot(model)
        other.step(lambda other=other: cross_entropy(other.model))
        assert_same_state(model.state_dict(), before)
        cross_entropy(other.model).backward()
        with pytest.raises(UsageError, match="has not used"):
            other.step(lambda other=other: cross_entropy(other.model))


def test_the_regulariser_leaves_no_hook_behind() -> None:
    model = Smooth()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        regulariser(model, optimizer).step(lambda: cross_entropy(model))
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
