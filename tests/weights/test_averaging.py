"""SWATracker: Equation 10, the schedule of Algorithm 1, resuming, use in a model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from openvclip import SWATracker, interpolate
from openvclip.errors import (
    EmptyAverageError,
    StateMismatchError,
    UsageError,
)
from tests.helpers import (
    Net,
    assert_same_state,
    batch,
    cross_entropy,
    jump,
    same_bits,
    snapshot,
    through_a_file,
)


def spoil(model: nn.Module) -> None:
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    raise RuntimeError("in between")


def mean64(history: list[dict[str, Tensor]], name: str) -> Tensor:
    total = torch.zeros(history[0][name].shape, dtype=torch.float64)
    for state in history:
        total += state[name].double()
    return total / len(history)


# --- the mean ----------------------------------------------------------------------------------


def test_ten_thousand_updates_of_a_bf16_model_equal_the_float64_mean() -> None:
    """The error is at most one float32 spacing; that of a running mean is more than ten.

    With float64 sums, the average is correctly rounded.
    """
    model = nn.Linear(16, 8).bfloat16()
    start = {n: v.clone() for n, v in model.state_dict().items()}
    swa, wide = SWATracker(model), SWATracker(model, dtype=torch.float64)
    total = {n: torch.zeros(v.shape, dtype=torch.float64) for n, v in start.items()}
    running = {n: torch.zeros(v.shape) for n, v in start.items()}
    generator = torch.Generator().manual_seed(0)
    for step in range(10_000):
        for name, value in model.state_dict().items():
            noise = 0.002 * torch.randn(value.shape, generator=generator)
            value.copy_(start[name].float() + noise)
            total[name] += value.double()
            running[name].lerp_(value.float(), 1 / (step + 1))
        assert swa.update(model)
        wide.update(model)
    average, exactly = swa.averaged_state_dict(), wide.averaged_state_dict()
    for name in start:
        exact = total[name] / 10_000
        spacing = torch.finfo(torch.float32).eps * exact.abs().max()
        assert average[name].dtype == torch.float32
        assert ((average[name].double() - exact).abs() <= spacing).all()
        assert ((running[name].double() - exact).abs() > 10 * spacing).any()
        assert same_bits(exactly[name].float(), exact.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_mean_of_few_updates(dtype: torch.dtype) -> None:
    model = Net(freeze=False).to(dtype)
    swa = SWATracker(model)
    history = []
    for seed in range(7):
        jump(model, seed)
        swa.update(model)
        history.append(snapshot(model))
    average = swa.averaged_state_dict()
    tight = 1e-14 if dtype == torch.float64 else 1e-6
    for name, _ in model.named_parameters():
        assert average[name].dtype == (dtype if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(
            average[name].double(), mean64(history, name), rtol=tight, atol=tight
        )


def test_dtype_of_the_sums() -> None:
    model = nn.Linear(2, 2)
    swa = SWATracker(model, dtype=torch.float64)
    history = []
    for seed in range(50):
        jump(model, seed)
        swa.update(model)
        history.append(snapshot(model))
    average = swa.averaged_state_dict()
    assert average["weight"].dtype == torch.float64
    torch.testing.assert_close(average["weight"], mean64(history, "weight"), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_never_narrower_than_float32(dtype: torch.dtype) -> None:
    model = nn.Linear(1, 1).to(dtype)
    swa = SWATracker(model, dtype=dtype)
    for step in range(3000):
        model.weight.data.fill_(1.0 + (step % 2))
        swa.update(model)
    assert swa.averaged_state_dict()["weight"].item() == 1.5


@given(st.floats(0.0, 1.0), st.integers(1, 6), st.integers(0, 100))
def test_the_average_of_interpolations_is_the_interpolation_of_the_average(
    lam: float, n: int, seed: int
) -> None:
    clip = snapshot(Net(99, freeze=False).double())
    model, patched = Net(0, freeze=False).double(), Net(0, freeze=False).double()
    swa, swa_of_patched = SWATracker(model), SWATracker(patched)
    for i in range(n):
        jump(model, 10 * seed + i)
        patched.load_state_dict(interpolate(clip, model.state_dict(), lam))
        swa.update(model)
        swa_of_patched.update(patched)
    left = swa_of_patched.averaged_state_dict()
    right = interpolate(clip, swa.averaged_state_dict(), lam)
    for name, _ in model.named_parameters():
        torch.testing.assert_close(left[name], right[name], rtol=1e-12, atol=1e-12)


# --- the schedule ------------------------------------------------------------------------------


def algorithm_1(start: int, cycle: int, weights: list[float]) -> tuple[list[int], float | None]:
    """Return the averaged steps and theta_SWA, by the lines of Algorithm 1 on averaging."""
    step, counting, theta_swa, averaged = 0, 0, None, []
    for theta in weights:
        step = step + 1
        if step > start and (step - start) % cycle == 0:
            theta_swa = theta if counting == 0 else (theta_swa * counting + theta) / (counting + 1)
            counting = counting + 1
            averaged.append(step)
    return averaged, theta_swa


@given(st.integers(0, 8), st.integers(1, 6), st.integers(0, 25))
def test_schedule_of_algorithm_1(start: int, every: int, steps: int) -> None:
    weights = [float(i * i % 11) for i in range(1, steps + 1)]
    model = nn.Linear(1, 1, bias=False)
    swa = SWATracker(model, start=start, every=every, dtype=torch.float64)
    entered = []
    for step, weight in enumerate(weights, start=1):
        model.weight.data.fill_(weight)
        if swa.update(model):
            entered.append(step)
    expected, theta = algorithm_1(start, every, weights)
    assert entered == expected
    assert swa.n_averaged == len(expected)
    if theta is None:
        with pytest.raises(EmptyAverageError, match=f"first enters at step {start + every}"):
            swa.averaged_state_dict()
    else:
        assert swa.averaged_state_dict()["weight"].item() == pytest.approx(theta, rel=1e-12)


@pytest.mark.parametrize("settings_", [{"start": -1}, {"every": 0}])
def test_settings_out_of_range(settings_: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="expected whole numbers of steps, start >= 0"):
        SWATracker(nn.Linear(1, 1), **settings_)  # type: ignore[arg-type]


# --- save and load -----------------------------------------------------------------------------


@given(st.integers(0, 9), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
@settings(max_examples=15)
def test_resumed_is_bitwise_never_stopped(stop: int, dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    straight, first = (SWATracker(model, start=1, every=2) for _ in range(2))
    for step in range(10):
        if step == stop:
            saved = through_a_file(first.state_dict())
            first = SWATracker(Net(7).to(dtype), start=5, every=9)
            first.load_state_dict(saved)
        jump(model, step)
        straight.update(model)
        first.update(model)
    assert first.n_averaged == straight.n_averaged == 4
    assert_same_state(first.averaged_state_dict(), straight.averaged_state_dict())


def test_a_loaded_state_is_a_copy_and_is_matched_by_name() -> None:
    model = Net()
    swa, other = SWATracker(model), SWATracker(model)
    swa.update(model)
    state = swa.state_dict()
    for part in ("sums", "carried"):  # as if loaded from a safetensors file, which is sorted
        state[part] = dict(sorted(state[part].items(), reverse=True))
    other.load_state_dict(state)
    jump(model, 1)
    swa.update(model)
    other.update(model)
    assert_same_state(other.averaged_state_dict(), swa.averaged_state_dict())
    with other.applied(model):
        assert same_bits(model.head.weight, swa.averaged_state_dict()["head.weight"])


def test_states_that_do_not_fit() -> None:
    model = Net()
    swa = SWATracker(model)
    swa.update(model)
    state = swa.state_dict()
    with pytest.raises(StateMismatchError, match="not the state of a SWATracker") as caught:
        swa.load_state_dict({"sums": {}, "foreign": 1})
    assert caught.value.unexpected == ["foreign"]
    assert "n_averaged" in caught.value.missing
    with pytest.raises(StateMismatchError, match="Freeze the same parameters"):
        SWATracker(Net(freeze=False)).load_state_dict(state)
    with pytest.raises(StateMismatchError):
        SWATracker(nn.Linear(4, 4)).load_state_dict(state)


# --- applied -----------------------------------------------------------------------------------


def test_applied_puts_the_live_weights_back() -> None:
    model = Net().bfloat16()
    swa = SWATracker(model)
    for seed in range(3):
        jump(model, seed)
        model.norm.running_mean.fill_(seed)
        swa.update(model)
    jump(model, 9)
    model.body.weight.data[0, 0] = -0.0
    model.norm.running_mean.fill_(50.0)
    model.norm.num_batches_tracked.fill_(77)
    live = snapshot(model)
    parameters = dict(model.named_parameters())
    average = swa.averaged_state_dict()
    with swa.applied(model) as inside:
        assert inside is model
        assert_same_state(model.state_dict(), {n: v.to(live[n].dtype) for n, v in average.items()})
        assert model.norm.running_mean[0] == 2.0
        assert not same_bits(model.head.weight, live["head.weight"])
    assert_same_state(model.state_dict(), live)
    assert all(p is parameters[n] for n, p in model.named_parameters())

    with pytest.raises(RuntimeError, match="in between"), swa.applied(model):
        spoil(model)
    assert_same_state(model.state_dict(), live)


def test_training_goes_on_as_if_never_applied() -> None:
    runs = []
    for with_average in (False, True):
        torch.manual_seed(0)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        swa = SWATracker(model)
        for step in range(6):
            optimizer.zero_grad()
            cross_entropy(model, step).backward()
            optimizer.step()
            swa.update(model)
            if with_average:
                with swa.applied(model), torch.no_grad():
                    model(batch(step)[0])  # train mode changes the buffers of the batch norm too
        runs.append(snapshot(model))
    assert_same_state(runs[0], runs[1])
