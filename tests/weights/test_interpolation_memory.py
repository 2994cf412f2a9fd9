"""Interpolation into an earlier result and into a model: values, and no allocated memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from openvclip import interpolate, interpolate_into
from openvclip.errors import StateMismatchError, UsageError
from tests.helpers import Net, assert_same_state, same_bits, snapshot

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(5, 3, generator=generator).to(dtype),
        "scale": torch.randn((), generator=generator).to(dtype),
    }


# --- an earlier result, overwritten ------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_out_is_overwritten_with_what_a_new_result_holds(dtype: torch.dtype, lam: float) -> None:
    a, b = state(1, dtype), state(2, dtype)
    a["mask"], b["mask"] = (torch.tensor([-math.inf, 1.0]).to(dtype) for _ in range(2))
    a["steps"], b["steps"] = torch.tensor(3), torch.tensor(5)
    earlier = interpolate(a, state(3, dtype) | {"mask": b["mask"], "steps": a["steps"]}, 0.7)
    addresses = {name: value.data_ptr() for name, value in earlier.items()}
    again = interpolate(a, b, lam, out=earlier)
    assert {name: value.data_ptr() for name, value in again.items()} == addresses
    assert_same_state(again, interpolate(a, b, lam))


def test_nothing_is_allocated_with_out() -> None:
    a, b = ({"w": torch.randn(1000, 100)} for _ in range(2))
    earlier = interpolate(a, b, 0.5)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        interpolate(a, b, 0.3, out=earlier)
    largest = max((event.self_cpu_memory_usage for event in profiled.events()), default=0)
    assert largest < 1000


def test_out_that_shares_memory_with_an_input() -> None:
    a, b = state(1), state(2)
    before = {name: value.clone() for name, value in b.items()}
    with pytest.raises(UsageError, match=r"2 entries of out share memory .*\(w, scale\)"):
        interpolate(a, b, 0.5, out=b)
    assert_same_state(b, before)


def test_out_that_shares_memory_within_itself_or_is_of_another_kind() -> None:
    a, b = {"v": torch.zeros(2), "w": torch.zeros(2)}, {"v": torch.ones(2), "w": torch.rand(2)}
    twice = torch.empty(2)
    with pytest.raises(UsageError, match=r"1 entries of out share memory .*\(w\)"):
        interpolate(a, b, 0.5, out={"v": twice, "w": twice})
    with pytest.raises(UsageError, match=r"1 entries of out are whole numbers .*\(v\)"):
        interpolate(a, b, 0.5, out={"v": torch.zeros(2, dtype=torch.int64), "w": twice})


def test_out_with_entries_that_hold_nothing() -> None:
    """All empty tensors have the address 0, but share no memory."""
    a, b = ({"none": torch.empty(0), "also": torch.empty(3, 0)} for _ in range(2))
    assert_same_state(interpolate(a, b, 0.5, out=interpolate(a, b, 0.5)), b)


def test_out_of_another_model_and_out_with_a_dtype() -> None:
    a, b = state(1), state(2)
    with pytest.raises(StateMismatchError, match=r"missing \(1\): scale"):
        interpolate(a, b, 0.5, out={"w": torch.empty(5, 3)})
    with pytest.raises(UsageError, match="the entries of out keep their dtypes"):
        interpolate(a, b, 0.5, out=state(3), dtype=torch.float64)


# --- into a live model -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.8, 1.0])
def test_into_a_model_equals_interpolate(dtype: torch.dtype, lam: float) -> None:
    a, b = snapshot(Net(0).to(dtype)), snapshot(Net(1).to(dtype))
    b["norm.num_batches_tracked"].fill_(7)
    model = Net(2).to(dtype)
    parameters = dict(model.named_parameters())
    addresses = {n: t.data_ptr() for n, t in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    before = [{n: v.clone() for n, v in s.items()} for s in (a, b)]
    interpolate_into(model, a, b, lam)
    assert_same_state(model.state_dict(), interpolate(a, b, lam))
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == addresses
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert_same_state(a, before[0])
    assert_same_state(b, before[1])


def test_into_a_wrapped_model_and_into_one_whose_only_child_is_called_module() -> None:
    class Box(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    a, b = snapshot(nn.Linear(2, 2)), snapshot(nn.Linear(2, 2))
    expected = interpolate(a, b, 0.3)
    for model in (nn.DataParallel(nn.Linear(2, 2)), Box()):
        interpolate_into(model, a, b, 0.3)
        assert [same_bits(v, model.module.state_dict()[n]) for n, v in expected.items()] == [
            True
        ] * 2


def test_into_a_model_it_does_not_fit() -> None:
    with pytest.raises(StateMismatchError, match="do not fit the model") as caught:
        interpolate_into(nn.Linear(2, 2), state(0), state(1), 0.5)
    assert caught.value.missing == ["bias", "weight"]


def test_into_a_model_allocates_less_than_one_entry() -> None:
    model = nn.Linear(256, 256)
    a, b = snapshot(nn.Linear(256, 256)), snapshot(nn.Linear(256, 256))

    def largest_allocation(lam: float) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
            interpolate_into(model, a, b, lam)
        return max(event.self_cpu_memory_usage for event in prof.events())

    entry = 256 * 256 * 4
    assert largest_allocation(0.3) < entry // 4
    assert largest_allocation(0.0) < entry // 4
    assert largest_allocation(1.0) < entry // 4
