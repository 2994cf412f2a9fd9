"""GaussianTracker: the weighted mean in float64, its laws, resuming, and weights far from mu."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openvclip import GaussianTracker, SWATracker
from openvclip.errors import NonFiniteWeightsError, StateMismatchError, UsageError
from openvclip.weights import gaussian, sums
from tests.helpers import Net, assert_same_state, jump, same_bits, snapshot, through_a_file

STEPS = st.floats(-50, 80)
SIGMAS = st.floats(0.05, 1e4)


def run(values: list[float], tracker: GaussianTracker, model: nn.Linear) -> float:
    for value in values:
        model.weight.data.fill_(value)
        tracker.update(model)
    return float(tracker.averaged_state_dict()["weight"])


def scalar() -> nn.Linear:
    return nn.Linear(1, 1, bias=False)


def weighted_mean(steps: list[int], values: list[Tensor], mu: float, sigma: float) -> Tensor:
    """The definition, with the largest exponent taken out of all."""
    t = torch.tensor(steps, dtype=torch.float64)
    logs = -((t - mu) ** 2) / (2 * sigma**2)
    weights = (logs - logs.max()).exp()
    stacked = torch.stack([value.double() for value in values])
    return torch.tensordot(weights / weights.sum(), stacked, dims=1)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=30), STEPS, SIGMAS, st.integers(1, 4))
def test_is_the_weighted_mean(values: list[float], mu: float, sigma: float, every: int) -> None:
    steps = [step for step in range(1, len(values) + 1) if step > 2 and (step - 2) % every == 0]
    model = scalar()
    tracker = GaussianTracker(model, mu=mu, sigma=sigma, start=2, every=every, dtype=torch.float64)
    for step, value in enumerate(values, start=1):
        model.weight.data.fill_(value)
        assert tracker.update(model) == (step in steps)
    assert tracker.n_averaged == len(steps)
    if steps:
        kept = [torch.tensor(values[step - 1]) for step in steps]
        got = tracker.averaged_state_dict()["weight"].item()
        expected = weighted_mean(steps, kept, mu, sigma).item()
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_long_run_in_float32(dtype: torch.dtype) -> None:
    model = nn.Linear(8, 4).to(dtype)
    tracker, history = GaussianTracker(model, mu=400, sigma=60), []
    for step in range(600):
        jump(model, step)
        tracker.update(model)
        history.append(snapshot(model)["weight"])
    expected = weighted_mean(list(range(1, 601)), history, 400, 60)
    average = tracker.averaged_state_dict()["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("block", [3, 128])
def test_an_infinite_sigma_is_swa(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(sums, "_BLOCK", block)
    model = Net().bfloat16()
    tracker = GaussianTracker(model, mu=7, sigma=math.inf, start=1, every=2)
    swa = SWATracker(model, start=1, every=2)
    for step in range(21):
        jump(model, step)
        tracker.update(model)
        swa.update(model)
    assert_same_state(tracker.averaged_state_dict(), swa.averaged_state_dict())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-9, 9), min_size=1, max_size=12), STEPS, SIGMAS, st.integers(0, 300))
def test_a_shift_of_all_steps_changes_nothing(
    values: list[float], mu: float, sigma: float, shift: int
) -> None:
    a, b = scalar(), scalar()
    options: dict[str, Any] = {"sigma": sigma, "dtype": torch.float64}
    shifted = GaussianTracker(b, mu=mu + shift, start=shift, **options)
    expected = run(values, GaussianTracker(a, mu=mu, **options), a)
    assert run([0.0] * shift + values, shifted, b) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("mu", "chosen"), [(-1e7, 1.0), (1e7, 9.0), (4.0, 4.0), (1e300, 9.0)])
@pytest.mark.parametrize("sigma", [1e-300, 1e-3, 0.1])
def test_far_from_mu_the_nearest_model_is_the_average(
    mu: float, chosen: float, sigma: float
) -> None:
    """All weights underflow. Their ratios do not: the model nearest to mu outweighs the others."""
    model = scalar()
    tracker = GaussianTracker(model, mu=mu, sigma=sigma)
    assert run([float(step) for step in range(1, 10)], tracker, model) == chosen


def test_models_between_which_mu_lies_halfway_weigh_the_same() -> None:
    model = scalar()
    assert run([1.0, 3.0], GaussianTracker(model, mu=1.5, sigma=1e-200), model) == 2.0


def test_a_rising_weight_rescales_the_sums_without_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    averages = []
    for largest in (16, 1000):  # weights far above 1, once rescaled and once not
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        monkeypatch.setattr(gaussian, "_LARGEST", largest)
        tracker = GaussianTracker(model, mu=40, sigma=7, dtype=torch.float64)
        for step in range(40):
            jump(model, step)
            tracker.update(model)
        averages.append(tracker.averaged_state_dict()["weight"])
    torch.testing.assert_close(averages[0], averages[1], rtol=1e-11, atol=1e-13)


@given(st.integers(0, 11), st.sampled_from([torch.bfloat16, torch.float64]))
@settings(max_examples=12, deadline=None)
def test_resumed_is_bitwise_never_stopped(stop: int, dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    straight, first = (GaussianTracker(model, mu=9, sigma=1.5, start=1, every=2) for _ in range(2))
    for step in range(12):
        if step == stop:
            saved = through_a_file(first.state_dict())
            first = GaussianTracker(Net(7).to(dtype), mu=0, sigma=1)
            first.load_state_dict(saved)
        jump(model, step)
        straight.update(model)
        first.update(model)
    assert (first.mu, first.sigma, first.n_averaged) == (9.0, 1.5, 5)
    assert_same_state(first.averaged_state_dict(), straight.averaged_state_dict())
    swa = SWATracker(model)
    with pytest.raises(StateMismatchError, match="not the state of a SWATracker"):
        swa.load_state_dict(straight.state_dict())


def test_a_refused_model_leaves_no_weight_behind() -> None:
    model = Net()
    tracker, other = (GaussianTracker(model, mu=3, sigma=1) for _ in range(2))
    for step in range(4):
        jump(model, step)
        healthy = model.head.bias.detach().clone()
        if step == 2:
            model.head.bias.data[1] = math.nan
            with pytest.raises(NonFiniteWeightsError, match=r"head\.bias"):
                tracker.update(model)
            other._steps += 1  # a step without a model
        else:
            tracker.update(model)
            other.update(model)
        model.head.bias.data.copy_(healthy)
    assert_same_state(tracker.averaged_state_dict(), other.averaged_state_dict())


def test_applied() -> None:
    model = scalar()
    tracker = GaussianTracker(model, mu=2, sigma=1)
    run([1.0, 2.0, 3.0], tracker, model)
    with tracker.applied(model):
        assert model.weight.item() == pytest.approx(2.0)
    assert same_bits(model.weight, torch.tensor([[3.0]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": math.nan, "sigma": 1}, "mu=nan: expected a number of steps"),
        ({"mu": math.inf, "sigma": 1}, "mu=inf"),
        ({"mu": "3", "sigma": 1}, "mu='3'"),
        ({"mu": 3, "sigma": 0}, "sigma=0: expected a number of steps above 0"),
        ({"mu": 3, "sigma": -1.0}, "sigma=-1.0"),
        ({"mu": 3, "sigma": math.nan}, "sigma=nan"),
        ({"mu": 3, "sigma": True}, "sigma=True"),
        ({"mu": 3, "sigma": 1, "every": 0}, "every=0"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GaussianTracker(scalar(), **options)
