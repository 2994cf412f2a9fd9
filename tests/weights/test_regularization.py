"""InterpolatedWeightRegularizer: Equations 7-9, interpolated and restored weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from openvclip import InterpolatedWeightRegularizer
from tests.helpers import (
    Net,
    Smooth,
    assert_same_state,
    batch,
    cross_entropy,
    gradients,
    randomise,
    same_bits,
    snapshot,
)


def alphas(interval: tuple[float, float], n: int, seed: int = 0) -> list[float]:
    """Return the first draws of a regulariser with these settings."""
    iwr = InterpolatedWeightRegularizer(Smooth(), interval=interval, seed=seed)
    return [_drawn(iwr) for _ in range(n)]


def _drawn(iwr: InterpolatedWeightRegularizer) -> float:
    with iwr.interpolated() as alpha:
        return alpha


def gradient_of_equation_7(
    model: nn.Module, anchor: dict[str, Tensor], alpha: float, c: float
) -> dict[str, Tensor]:
    """Autograd through alpha * anchor + (1 - alpha) * theta, with beta = C / (1 - alpha)."""
    x, y = batch(dtype=torch.float64)
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    mixed = {n: alpha * anchor[n] + (1.0 - alpha) * theta[n] for n in theta}
    loss = functional.cross_entropy(functional_call(model, theta, (x,)), y)
    patched = functional.cross_entropy(functional_call(model, mixed, (x,)), y)
    (loss + c / (1.0 - alpha) * patched).backward()
    return {n: p.grad for n, p in theta.items() if p.grad is not None}


def step_gradients(
    model: nn.Module, anchor: dict[str, Tensor], alpha: float, c: float
) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    iwr = InterpolatedWeightRegularizer(
        model, optimizer, anchor=anchor, interval=(alpha, alpha), weight=c
    )
    iwr.step(lambda: cross_entropy(model, dtype=torch.float64))
    return gradients(model)


# --- the gradient ------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.floats(0.0, 0.95), st.floats(0.0, 3.0), st.integers(0, 50))
def test_gradient_is_that_of_equation_7(alpha: float, c: float, seed: int) -> None:
    model, anchor = Smooth(seed).double(), snapshot(Smooth(seed + 1).double())
    expected = gradient_of_equation_7(model, anchor, alpha, c)
    got = step_gradients(model, anchor, alpha, c)
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-12)


@settings(max_examples=10)
@given(st.floats(0.0, 2.0), st.floats(0.0, 2.0), st.floats(0.0, 1.0))
def test_gradient_is_linear_in_c(one: float, other: float, alpha: float) -> None:
    anchor = snapshot(Smooth(1).double())
    zero, left, right, both = (
        step_gradients(Smooth(0).double(), anchor, alpha, c) for c in (0.0, one, other, one + other)
    )
    for name in both:
        torch.testing.assert_close(
            both[name] - zero[name],
            (left[name] - zero[name]) + (right[name] - zero[name]),
            rtol=1e-10,
            atol=1e-12,
        )


def test_weight_zero_is_plain_training() -> None:
    anchor = snapshot(Smooth(1).double())
    model = Smooth(0).double()
    cross_entropy(model, dtype=torch.float64).backward()
    plain = gradients(model)
    got = step_gradients(model, anchor, 0.5, 0.0)
    assert all(same_bits(got[name], plain[name]) for name in plain)


# --- a step ------------------------------------------------------------------------------------


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "one by one": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False, fused=False),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_equal_an_optimizer_with_gradients_made_by_hand(kind: str) -> None:
    """Equality is bitwise, so the weights are restored before the step of the optimizer."""
    model, by_hand = Smooth(0, freeze=True), Smooth(0, freeze=True)
    anchor = snapshot(Smooth(1))
    optimizer, other = (OPTIMIZERS[kind](m.parameters()) for m in (model, by_hand))
    iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=anchor, weight=0.7, seed=3)
    for step, alpha in enumerate(alphas((0.0, 0.6), 5, seed=3)):
        loss = iwr.step(lambda step=step: cross_entropy(model, step))  # type: ignore[misc]
        assert not loss.requires_grad

        other.zero_grad()
        plain = cross_entropy(by_hand, step)
        plain.backward()
        assert same_bits(loss, plain.detach())
        second = Smooth(0)
        trained = [n for n, p in by_hand.named_parameters() if p.requires_grad]
        mixed = snapshot(by_hand)
        for name in trained:
            mixed[name] = torch.lerp(mixed[name], anchor[name], alpha)
        second.load_state_dict(mixed)
        (0.7 * cross_entropy(second, step)).backward()
        for name in trained:
            by_hand.get_parameter(name).grad += second.get_parameter(name).grad
        other.step()
        assert_same_state(model.state_dict(), by_hand.state_dict())


def test_the_closure_runs_twice_and_once_where_every_says_so() -> None:
    model = Smooth()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    iwr = InterpolatedWeightRegularizer(model, optimizer, every=3)
    calls = []
    for step in range(7):

        def closure(step: int = step) -> Tensor:
            calls.append(step)
            return cross_entropy(model)

        iwr.step(closure)
    assert calls == [0, 0, 1, 2, 3, 3, 4, 5, 6, 6]


def test_gradients_of_an_earlier_step_are_cleared() -> None:
    model = Smooth()
    anchor = snapshot(Smooth(1))
    first = {
        n: g.clone() for n, g in step_gradients(model.double(), _double(anchor), 0.3, 1.0).items()
    }
    again = step_gradients(model, _double(anchor), 0.3, 1.0)
    assert all(same_bits(first[name], again[name]) for name in first)


def _double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in state.items()}


# --- interpolated and restored weights ---------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inside_the_block_the_weights_are_the_interpolated_ones(dtype: torch.dtype) -> None:
    model, anchor = randomise(Net(0).to(dtype), 0), snapshot(randomise(Net(1).to(dtype), 1))
    before = snapshot(model)
    parameters = dict(model.named_parameters())
    iwr = InterpolatedWeightRegularizer(model, anchor=anchor, interval=(0.3, 0.3))
    with iwr.interpolated() as alpha:
        assert alpha == pytest.approx(0.3)
        for name, value in model.state_dict().items():
            parameter = parameters.get(name)
            if parameter is None or not parameter.requires_grad:
                assert same_bits(value, before[name]), name
            else:
                exact = alpha * anchor[name].double() + (1 - alpha) * before[name].double()
                slack = 1e-6 if dtype.itemsize < 8 else 1e-14
                assert ((exact - slack).to(dtype) <= value).all()
                assert (value <= (exact + slack).to(dtype)).all()
                assert not same_bits(value, before[name]), name
    assert_same_state(model.state_dict(), before)
    assert all(p is parameters[n] for n, p in model.named_parameters())


def test_parameters_of_several_dtypes() -> None:
    model, other = Smooth(0), Smooth(1)
    for m in (model, other):
        m.first.bfloat16()
        m.scale.data = m.scale.data.double()
    before, anchor = snapshot(model), snapshot(other)
    iwr = InterpolatedWeightRegularizer(model, anchor=anchor, interval=(0.25, 0.25))
    with iwr.interpolated():
        for name, value in model.state_dict().items():
            exact = 0.25 * anchor[name].double() + 0.75 * before[name].double()
            assert value.dtype == before[name].dtype
            torch.testing.assert_close(value, exact.to(value.dtype))
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize("fails_in_call", [1, 2])
def test_after_an_exception_in_the_loss_the_weights_are_back(fails_in_call: int) -> None:
    model = Net()
    model.head.weight.data[0, 0] = -0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    iwr = InterpolatedWeightRegularizer(model, optimizer, anchor=snapshot(Net(1)))
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fails_in_call:
            raise KeyboardInterrupt
        return cross_entropy(model)

    with pytest.raises(KeyboardInterrupt):
        iwr.step(closure)
    assert all(same_bits(p, parameters[n]) for n, p in model.named_parameters())
    assert not optimizer.state
    assert bool(gradients(model)) == (fails_in_call == 2)  # the next step clears these gradients
    with iwr.interpolated():  # the earlier block counts as ended
        pass
    iwr.step(lambda: cross_entropy(model))
    assert not same_bits(model.head.weight, parameters["head.weight"])


def _spoil(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(torch.nan)
    raise ZeroDivisionError


def test_after_an_exception_in_the_block_the_weights_are_back() -> None:
    model = Net()
    before = snapshot(model)
    iwr = InterpolatedWeightRegularizer(model, anchor=snapshot(Net(1)))
    with pytest.raises(ZeroDivisionError), iwr.interpolated():
        _spoil(model)
    assert_same_state(model.state_dict(), before)


def test_backward_after_the_block_is_refused_by_autograd() -> None:
    model = Smooth()
    iwr = InterpolatedWeightRegularizer(model, anchor=snapshot(Smooth(1)))
    with iwr.interpolated():
        loss = cross_entropy(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
