"""L2ToAnchor equals the sum that its docstring states, and the gradient of that sum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import openvclip
from openvclip.errors import RegularizationError, StateMismatchError, UsageError
from tests.helpers import Net, Smooth, assert_same_state, cross_entropy, gradients, jump, snapshot


def moved(**settings: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    model = Smooth(0, **settings)
    anchor = snapshot(model)
    jump(model, 1)
    return model, anchor


def test_the_penalty_is_the_sum_over_all_elements() -> None:
    model, anchor = moved()
    model.double()
    total = 0.0
    for name, parameter in model.named_parameters():
        for now, before in zip(parameter.flatten(), anchor[name].flatten(), strict=True):
            total += 0.3 * (now.item() - before.item()) ** 2
    penalty = openvclip.L2ToAnchor(model, anchor, weight=0.3)
    assert penalty.loss().item() == pytest.approx(total, rel=1e-12)
    penalty.weight = 0.6
    assert penalty.loss().item() == pytest.approx(2 * total, rel=1e-12)
    penalty.loss().backward()
    for name, parameter in model.named_parameters():
        expected = 2 * 0.6 * (parameter.detach() - anchor[name].double())
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=0)


def test_the_gradients_without_a_graph_are_those_of_the_loss_bitwise() -> None:
    model, anchor = moved(freeze=True)
    penalty = openvclip.L2ToAnchor(model, anchor, weight=0.3)
    cross_entropy(model).backward()
    plain = gradients(model)
    penalty.loss().backward()
    by_loss = gradients(model)
    for name, parameter in model.named_parameters():
        parameter.grad = plain[name].clone() if name in plain else None
    penalty.add_gradients()
    assert_same_state(gradients(model), by_loss)
    # The arithmetic of the trainer, from before this class existed.
    by_hand = {
        name: plain[name].clone().add_((parameter.detach() - anchor[name]).mul_(2 * 0.3))
        for name, parameter in model.named_parameters()
        if name in plain
    }
    assert_same_state(by_hand, by_loss)
    assert "first.weight" not in by_loss


def test_parameters_without_a_gradient_stay_without_one() -> None:
    model, anchor = moved()
    openvclip.L2ToAnchor(model, anchor, weight=1.0).add_gradients()
    assert gradients(model) == {}


def test_without_an_anchor_the_present_weights_are_copied() -> None:
    model = Net(0)
    penalty = openvclip.L2ToAnchor(model, weight=1.0)
    assert penalty.loss().item() == 0.0
    with torch.no_grad():
        model.head.weight.add_(1.0)
    assert penalty.loss().item() == pytest.approx(model.head.weight.numel())
    with torch.no_grad():  # a frozen parameter is not part of the penalty
        model.frozen.weight.add_(1.0)
    assert penalty.loss().item() == pytest.approx(model.head.weight.numel())


def test_the_arithmetic_of_bfloat16_is_that_of_float32() -> None:
    model, anchor = moved()
    model.bfloat16()
    expected = sum(
        float((p.detach().double() - anchor[n].double()).square().sum())
        for n, p in model.named_parameters()
    )
    loss = openvclip.L2ToAnchor(model, anchor, weight=1.0).loss()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_squares_of_float16_neither_underflow_nor_overflow() -> None:
    model = nn.Linear(64, 64, bias=False).half()
    penalty = openvclip.L2ToAnchor(model, weight=1.0)
    anchor = snapshot(model)["weight"].double()
    for drift in (1e-4, 40.0):
        with torch.no_grad():
            model.weight.copy_(anchor + drift)
        expected = (model.weight.detach().double() - anchor).square().sum().item()
        assert expected > 0
        assert penalty.loss().item() == pytest.approx(expected, rel=1e-5)


def test_a_new_head_has_no_penalty() -> None:
    model, anchor = moved()
    body = {name: value for name, value in anchor.items() if name.startswith("first.")}
    with pytest.raises(StateMismatchError, match=r"second\.weight"):
        openvclip.L2ToAnchor(model, body, weight=1.0)
    openvclip.L2ToAnchor(model, body, weight=1.0, missing="skip").loss().backward()
    assert set(gradients(model)) == set(body)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_wrong_weights_are_refused(weight: float) -> None:
    with pytest.raises(RegularizationError, match="expected a finite number of at least 0"):
        openvclip.L2ToAnchor(Smooth(0), weight=weight)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(RegularizationError, match="expected 'error' or 'skip'"):
        openvclip.L2ToAnchor(Smooth(0), weight=1.0, missing="ignore")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="No parameter of the model requires gradients"):
        openvclip.L2ToAnchor(Smooth(0).requires_grad_(False), weight=1.0)
