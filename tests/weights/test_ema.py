"""EMATracker: the recurrence, the warm-up, resuming, and the rules of all trackers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from openvclip import interpolate
from openvclip.errors import NonFiniteWeightsError, StateMismatchError, UsageError
from openvclip.weights.averaging import EMATracker, LAWATracker, SWATracker
from openvclip.weights.names import named_parameters
from openvclip.weights.shards import full_state
from tests.forked import started
from tests.helpers import Net, assert_same_state, jump, same_bits, snapshot, through_a_file


def recurrence(values: list[float], decay: float, warmup: bool) -> float:
    """The update of torch_ema, starting with the first value."""
    shadow = values[0]
    for num_updates, value in enumerate(values[1:], start=1):
        d = min(decay, (1 + num_updates) / (10 + num_updates)) if warmup else decay
        shadow = shadow - (1.0 - d) * (shadow - value)
    return shadow


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=30), st.floats(0.0, 0.999), st.booleans()
)
def test_equals_the_recurrence(values: list[float], decay: float, warmup: bool) -> None:
    model = nn.Linear(1, 1, bias=False).double()
    ema = EMATracker(model, decay=decay, warmup=warmup)
    for value in values:
        model.weight.data.fill_(value)
        assert ema.update(model)
    got = ema.averaged_state_dict()["weight"].item()
    assert got == pytest.approx(recurrence(values, decay, warmup), rel=1e-12, abs=1e-11)


def test_small_updates_of_half_precision_weights_are_not_lost() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    ema = EMATracker(model, decay=0.9999)
    narrow = model.weight.detach().clone()
    for step in range(1000):
        model.weight.data.fill_(1.0 if step == 0 else 2.0)
        ema.update(model)
        narrow.lerp_(model.weight.detach(), 1 - 0.9999)
    assert ema.averaged_state_dict()["weight"].dtype == torch.float32
    exact = 2.0 - 0.9999**999
    assert ema.averaged_state_dict()["weight"].item() == pytest.approx(exact, rel=1e-5)
    assert narrow.item() == 1.0


def test_schedule_and_carried_entries() -> None:
    model = Net()
    ema = EMATracker(model, decay=0.5, start=2, every=3)
    taken = []
    for step in range(1, 12):
        jump(model, step)
        model.norm.num_batches_tracked.fill_(step)
        if ema.update(model):
            taken.append((step, snapshot(model)))
    assert [step for step, _ in taken] == [5, 8, 11]
    average = ema.averaged_state_dict()
    expected = interpolate(interpolate(taken[0][1], taken[1][1], 0.5), taken[2][1], 0.5)
    for name, value in expected.items():
        torch.testing.assert_close(average[name], value)
    assert same_bits(average["frozen.weight"], model.frozen.weight)
    assert average["norm.num_batches_tracked"] == 11
    model.load_state_dict(average)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 9), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_resumed_is_bitwise_never_stopped(stop: int, dtype: torch.dtype) -> None:
    model = Net().to(dtype)
    straight, first = (EMATracker(model, decay=0.8, warmup=True, every=2) for _ in range(2))
    for step in range(10):
        if step == stop:
            saved = through_a_file(first.state_dict())
            first = EMATracker(Net(7).to(dtype))
            first.load_state_dict(saved)
        jump(model, step)
        straight.update(model)
        first.update(model)
    assert (first.decay, first.warmup, first.every) == (0.8, True, 2)
    assert_same_state(first.averaged_state_dict(), straight.averaged_state_dict())


def test_applied_and_errors_leave_things_as_they_were() -> None:
    model = Net()
    ema = EMATracker(model, decay=0.5)
    for seed in range(3):
        jump(model, seed)
        ema.update(model)
    live, before = snapshot(model), ema.averaged_state_dict()
    with ema.applied(model):
        assert_same_state(model.state_dict(), before)
    assert_same_state(model.state_dict(), live)
    model.head.bias.data[0] = float("nan")
    with pytest.raises(NonFiniteWeightsError, match=r"1 entries \(head.bias\)"):
        ema.update(model)
    assert_same_state(ema.averaged_state_dict(), before)
    before["head.weight"].zero_()
    assert ema.averaged_state_dict()["head.weight"].abs().sum() > 0


def test_a_fixed_device_is_kept() -> None:
    model = Net()
    ema, plain = EMATracker(model, decay=0.5, device="cpu"), EMATracker(model, decay=0.5)
    for seed in range(3):
        jump(model, seed)
        ema.update(model)
        plain.update(model)
    assert_same_state(ema.averaged_state_dict(), plain.averaged_state_dict())


def test_settings_and_states_that_do_not_fit() -> None:
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(UsageError, match="expected a number in"):
            EMATracker(Net(), decay=decay)
    model = Net()
    ema = EMATracker(model)
    ema.update(model)
    with pytest.raises(StateMismatchError, match="not the state of a EMATracker"):
        ema.load_state_dict({"average": {}})
    with pytest.raises(StateMismatchError, match="Freeze the same parameters"):
        EMATracker(Net(freeze=False)).load_state_dict(ema.state_dict())


def average_shards(meeting: str) -> None:
    """Compare the averages of a model and of its sharded twin; runs in a process of its own."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)

    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))

    plain, sharded = make(), make()
    mesh = init_device_mesh("cpu", (1,))
    for part in (sharded[0], sharded):
        fully_shard(part, mesh=mesh)
    for kind in (SWATracker, EMATracker, LAWATracker):
        one, other = kind(plain), kind(sharded)
        for step in range(8):
            torch.manual_seed(step)
            for a, b in zip(plain.parameters(), named_parameters(sharded).values(), strict=True):
                a.data.normal_()
                b.data.to_local().copy_(a.data)
            one.update(plain)
            other.update(sharded)
        average = other.averaged_state_dict()
        assert all(isinstance(value, DTensor) for value in average.values())
        for name, value in full_state(average).items():
            assert torch.equal(value, one.averaged_state_dict()[name]), (kind, name)
        again = kind(sharded)
        again.load_state_dict(other.state_dict())
        with again.applied(sharded):
            inside = full_state(sharded.state_dict())["0.weight"].clone()
        assert torch.equal(inside, full_state(average)["0.weight"])
        assert torch.equal(full_state(sharded.state_dict())["0.weight"], plain[0].weight)
        next(iter(named_parameters(sharded).values())).data.to_local()[0, 0] = float("nan")
        with pytest.raises(NonFiniteWeightsError, match=r"\(0\.weight\)"):
            other.update(sharded)
    distributed.destroy_process_group()


def test_sharded_models_are_averaged_in_their_shards(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with started(average_shards, str(tmp_path / "meeting"), log=log) as process:
        process.join(120)
    assert process.exitcode == 0, log.read_text()
