"""Weights that change inside interpolated() are noticed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn import functional

from openvclip import InterpolatedWeightRegularizer, SWATracker
from openvclip.errors import UsageError
from tests.helpers import (
    Smooth,
    assert_same_state,
    batch,
    cross_entropy,
    same_bits,
    snapshot,
)
from tests.weights.regularised import regulariser, second_loss

# --- report 06: weights that change inside the block --------------------------------------------


class OldSGD(torch.optim.SGD):
    """Writes through ``.data``, as many optimizers outside of PyTorch do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-group["lr"])


IN_BACKWARD: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    ".data": lambda p: OldSGD(p, lr=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", IN_BACKWARD)
def test_an_optimizer_in_the_backward_pass_is_refused(kind: str, dtype: torch.dtype) -> None:
    # Report 06 (pytorch#124523): the step was undone, and training was plain fine-tuning.
    model = Smooth().to(dtype)
    own = {p: IN_BACKWARD[kind]([p]) for p in model.parameters()}

    def hook(parameter: Tensor) -> None:
        own[parameter].step()  # type: ignore[index]
        own[parameter].zero_grad()  # type: ignore[index]

    handles = [p.register_post_accumulate_grad_hook(hook) for p in model.parameters()]
    iwr, before = regulariser(model), snapshot(model)
    with (
        pytest.raises(UsageError, match=r"changed inside interpolated\(\).*5 parameters.*before"),
        iwr.interpolated(),
    ):
        (iwr.weight * cross_entropy(model, dtype=dtype)).backward()
    assert_same_state(model.state_dict(), before)
    for handle in handles:
        handle.remove()
    with iwr.interpolated():  # the block counts as ended
        (iwr.weight * cross_entropy(model, dtype=dtype)).backward()


def test_the_optimizer_in_backward_of_torch_distributed_is_refused_by_step() -> None:
    # Report 06 (pytorch#124523).
    model = Smooth()
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    iwr = regulariser(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = snapshot(model)
    with pytest.raises(UsageError, match="remove its hooks"):
        iwr.step(lambda: cross_entropy(model))
    assert_same_state(model.state_dict(), before)


def _scale(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("second.bias").mul_(2)


def _replace(model: nn.Module) -> None:
    model.first.bias = nn.Parameter(torch.zeros(6))  # type: ignore[union-attr]


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": _scale,
    "load_state_dict": lambda m: m.load_state_dict(snapshot(Smooth(3))),
    "load_state_dict(assign)": lambda m: m.load_state_dict(snapshot(Smooth(3)), assign=True),
    "replaced": _replace,
    "all through .data": lambda m: [p.data.mul_(2) for p in m.parameters()],
    ".data is another tensor": lambda m: [setattr(p, "data", p * 2) for p in m.parameters()],
    "another dtype": lambda m: m.double(),
    "averaged weights": lambda m: m.load_state_dict(snapshot(Smooth(1))),
    # The block restores the old memory, so the new parameters would stay interpolated.
    "copies of the interpolated weights": lambda m: m.load_state_dict(snapshot(m), assign=True),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_other_changes_of_the_weights_inside_the_block(kind: str) -> None:
    # Report 06 (pytorch#124523).
    model = Smooth()
    parameters, iwr = dict(model.named_parameters()), regulariser(model)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(UsageError, match="changed inside"), iwr.interpolated():
        CHANGES[kind](model)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach().float(), before[name], rtol=0, atol=0)


def test_writes_that_change_no_value_are_allowed() -> None:
    """A loss may clamp the temperature, and an average may be tried inside the block."""
    model = Smooth()
    iwr, swa, before = regulariser(model), SWATracker(model), snapshot(model)
    swa.update(model)
    for alpha in (0.0, 0.3, 1.0):
        with iwr.interpolated(alpha):
            with torch.no_grad():
                model.scale.clamp_(-100, 100)
            with swa.applied(model):
                cross_entropy(model)
            second_loss(iwr, model)
    assert_same_state(model.state_dict(), before)


def test_a_clamped_scale_does_not_hide_an_optimizer_that_is_not_recorded() -> None:
    model = Smooth()
    iwr, before = regulariser(model), snapshot(model)

    def clamp_and_step() -> None:
        with torch.no_grad():
            model.scale.clamp_(-100, 100)
        for parameter in model.parameters():
            if parameter is not model.scale:
                parameter.data.mul_(2)

    with pytest.raises(UsageError, match="changed inside"), iwr.interpolated(0.3):
        clamp_and_step()
    assert_same_state(snapshot(model), before)


def test_a_parameter_that_is_frozen_inside_the_block_did_not_change() -> None:
    model = Smooth()
    iwr, before = regulariser(model), snapshot(model)
    with iwr.interpolated():
        second_loss(iwr, model)
        model.first.requires_grad_(False)
    assert_same_state(model.state_dict(), before)


def test_nan_weights_did_not_change() -> None:
    model = Smooth()
    model.first.weight.data[0, 0] = math.nan
    with regulariser(model).interpolated():
        cross_entropy(model).backward()


def test_an_error_of_the_block_comes_before_the_error_about_the_weights() -> None:
    model = Smooth()
    with pytest.raises(ZeroDivisionError), regulariser(model).interpolated():  # noqa: PT012
        _scale(model)
        raise ZeroDivisionError


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_silent_writes_at_the_next_block_or_step() -> None:
    model = Smooth().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=snapshot(Smooth(1)))
    x, y = (part.cuda() for part in batch())
    before = snapshot(model)
    for _ in range(2):
        with iwr.interpolated():
            functional.cross_entropy(model(x), y).backward()
            CHANGES["all through .data"](model)
        with pytest.raises(UsageError, match="changed inside"), iwr.interpolated():
            pass
        optimizer.zero_grad()

    def closure() -> Tensor:
        return functional.cross_entropy(model(x), y)

    def spoiling(loss: Tensor) -> None:
        loss.backward()
        CHANGES["all through .data"](model)

    with pytest.raises(UsageError, match="changed inside"):
        iwr.step(closure, backward=spoiling)
    for parameter, old in zip(model.parameters(), before.values(), strict=True):
        assert same_bits(parameter, old) or same_bits(parameter, 2 * old)
    iwr.step(closure)
