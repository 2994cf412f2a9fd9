"""LAWATracker: the mean of the last k models, resuming, and the rules of all trackers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from openvclip.errors import (
    EmptyAverageError,
    NonFiniteWeightsError,
    StateMismatchError,
    UsageError,
)
from openvclip.weights.averaging import LAWATracker
from tests.helpers import Net, assert_same_state, jump, same_bits, snapshot, through_a_file


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=20), st.integers(1, 6))
def test_is_the_mean_of_the_latest(values: list[float], k: int) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    lawa = LAWATracker(model, k=k)
    for i, value in enumerate(values):
        model.weight.data.fill_(value)
        assert lawa.update(model)
        latest = values[max(0, i + 1 - k) : i + 1]
        assert lawa.n_averaged == len(latest)
        got = lawa.averaged_state_dict()["weight"].item()
        assert got == pytest.approx(sum(latest) / len(latest), rel=1e-12, abs=1e-12)


def test_old_models_leave_no_rounding_behind() -> None:
    """A running sum, minus the oldest model, would keep the rounding error of a large model."""
    model = nn.Linear(1, 1, bias=False)
    lawa = LAWATracker(model, k=2)
    for value in (1e10, 0.1, 0.3):
        model.weight.data.fill_(value)
        lawa.update(model)
    assert lawa.averaged_state_dict()["weight"].item() == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_are_kept_in_their_dtype_and_averaged_in_at_least_float32(
    dtype: torch.dtype,
) -> None:
    model = Net().to(dtype)
    lawa = LAWATracker(model, k=3, start=1, every=2)
    taken = []
    for step in range(1, 10):
        jump(model, step)
        if lawa.update(model):
            taken.append((step, snapshot(model)))
    assert [step for step, _ in taken] == [3, 5, 7, 9]
    state = lawa.state_dict()
    assert {v.dtype for slot in range(3) for v in state[f"model_{slot}"].values()} == {dtype}
    average = lawa.averaged_state_dict()
    for name, _ in model.named_parameters():
        if name.startswith("frozen"):
            assert same_bits(average[name], model.state_dict()[name])
            continue
        exact = sum(s[name].double() for _, s in taken[-3:]) / 3
        assert average[name].dtype == (dtype if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(average[name].double(), exact, rtol=1e-6, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 9))
def test_resumed_is_bitwise_never_stopped(stop: int) -> None:
    model = Net()
    straight, first = LAWATracker(model, k=3), LAWATracker(model, k=3)
    for step in range(10):
        if step == stop:
            saved = through_a_file(first.state_dict())
            first = LAWATracker(Net(7), k=3, every=5)
            first.load_state_dict(saved)
        jump(model, step)
        straight.update(model)
        first.update(model)
    assert_same_state(first.averaged_state_dict(), straight.averaged_state_dict())


def test_applied_and_errors_leave_things_as_they_were() -> None:
    model = Net()
    lawa = LAWATracker(model, k=2, device="cpu")
    with pytest.raises(EmptyAverageError):
        lawa.averaged_state_dict()
    for seed in range(3):
        jump(model, seed)
        lawa.update(model)
    live, before = snapshot(model), lawa.averaged_state_dict()
    with lawa.applied(model):
        assert_same_state(model.state_dict(), before)
    assert_same_state(model.state_dict(), live)
    model.body.weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteWeightsError, match=r"1 entries \(body.weight\)"):
        lawa.update(model)
    assert_same_state(lawa.averaged_state_dict(), before)


def test_settings_and_states_that_do_not_fit() -> None:
    for k in (0, 1.5):
        with pytest.raises(UsageError, match="expected a whole number of models"):
            LAWATracker(Net(), k=k)  # type: ignore[arg-type]
    model = Net()
    lawa = LAWATracker(model, k=2)
    lawa.update(model)
    with pytest.raises(StateMismatchError, match="not the state of a LAWATracker") as caught:
        LAWATracker(model, k=3).load_state_dict(lawa.state_dict())
    assert caught.value.missing == ["model_2"]
